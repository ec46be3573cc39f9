// What every stop of the slider costs on one text, and what it answers.

import { byId, make, milliseconds, percent } from "./dom.js";

/** Draw the columns above the slider and the table below it; `answers` are by stop, some missing. */
export function drawTrade(stops, answers, chosen) {
  const top = Math.max(1, ...answers.map(answer => (answer ? spent(answer) : 0)));
  const columns = byId("columns");
  document.documentElement.style.setProperty("--stops", stops.length);
  columns.replaceChildren(...stops.map((stop, at) => {
    const answer = answers[at];
    const column = make("div", { class: "column", css: { share: answer ? spent(answer) / top : 0 } },
      make("span", { class: "spent" }),
      make("span", { class: "what", text: answer ? percent(spent(answer), 0) : "" }),
      make("span", { class: "says", text: answer?.item.label ?? "", title: answer?.item.label ?? "" }));
    if (stop.share !== undefined) {
      column.append(make("span", { class: "mean", css: { share: stop.share / top } }));
    }
    column.classList.toggle("chosen", chosen.includes(at));
    column.classList.toggle("turns", at > 0 && Boolean(answer && answers[at - 1])
      && answer.item.label !== answers[at - 1].item.label);
    column.dataset.stop = at;
    return column;
  }));
  columns.setAttribute("aria-label", told(stops, answers));
  byId("ticks").replaceChildren(...stops.map(stop =>
    make("span", { text: stop.tick, class: stop.named ? "" : "number" })));
  byId("table").tBodies[0].replaceChildren(...stops.map((stop, at) => row(stop, answers[at])));
}

const spent = ({ item }) => item.macs / item.dense_macs;

function told(stops, answers) {
  return stops.map((stop, at) => {
    const answer = answers[at];
    if (!answer) return `${stop.name}: not asked yet`;
    return `${stop.name}: ${answer.item.label}, ${percent(spent(answer))} of the multiply-adds`;
  }).join("; ");
}

function row(stop, answer) {
  const cells = answer
    ? [answer.item.label, percent(answer.item.score), answer.item.heads.steps.join(", "), `${answer.item.heads.used} of ${answer.item.heads.total}`,
       percent(spent(answer))]
    : ["", "", "", "", ""];
  cells.push(stop.reached == null ? "" : percent(stop.reached));
  cells.push(answer ? milliseconds(answer.stages.total ?? 0) : "");
  return make("tr", {}, make("th", { scope: "row", text: stop.name }),
    ...cells.map(text => make("td", { text })));
}
