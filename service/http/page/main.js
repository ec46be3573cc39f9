// What the page shows, and when it asks.

import { AnswerCard } from "./answer.js";
import { askAgain, MOST_RETRIES, useKey } from "./api.js";
import { byId, make, part, percent, say } from "./dom.js";
import { examplesOf } from "./examples.js";
import { offerJobs } from "./jobs.js";
import { watch } from "./live.js";
import { chainOf, expectation, measureOf, stopsOf } from "./stops.js";
import { drawTrade } from "./trade.js";

const TYPING_PAUSE = 400;

const page = {
  model: null,      // the card of the model that is asked
  examples: [],
  stops: [],
  answers: [],      // by stop; undefined while not known
  chosen: [0],      // stops of A and, when two are compared, B
  cards: [],
  work: new AbortController(),
};
const text = byId("text"), sliders = [byId("quality-a"), byId("quality-b")];

/** Run what asks the server, in place of what did so before; its failure is shown. */
async function run(work) {
  page.work.abort();
  page.work = new AbortController();
  const { signal } = page.work;
  const again = () => run(work);
  const onWait = (error, retry) => showProblem(error, again, `Asking again in ${error.retryAfter} s (${retry} of ${MOST_RETRIES})`);
  try {
    await work({ signal, onWait });
    byId("problem").hidden = true;
  } catch (error) {
    if (!signal.aborted) showProblem(error, again);
  }
}

function showProblem(error, again, next) {
  const problem = byId("problem");
  say(part(problem, "title"), error.title ?? "Something went wrong in this page.");
  say(part(problem, "message"), error.message);
  part(problem, "detail").textContent = [next, error.detail].filter(Boolean).join(" · ");
  part(problem, "again").onclick = again;
  problem.hidden = false;
  hideAnswers();
  if (error.status === 401 || error.status === 403) {
    byId("key").open = true;
    byId("key-value").focus();
  }
}

function hideAnswers() {
  for (const card of page.cards) card.root.hidden = true;
}

async function chooseModels(request) {
  const { content } = await askAgain("v1/models", request);
  const select = byId("model"), wanted = select.value;
  select.replaceChildren(...content.data.map(({ id, version }) =>
    make("option", { value: id, text: `${id} ${version}` })));
  if (!content.data.length) throw new Error("This server has no model.");
  const kept = content.data.find(({ id }) => id === wanted) ?? content.data.find(model => model.default);
  if (kept) select.value = kept.id;
  await chooseModel(select.value, request);
}

async function chooseModel(name, request) {
  page.model = null;
  const { content } = await askAgain(`models/${encodeURIComponent(name)}`, request);
  page.model = content;
  page.stops = stopsOf(content);
  const balanced = page.stops.findIndex(stop => stop.name === "balanced");
  page.chosen = [balanced < 0 ? 0 : balanced, page.stops.length - 1].slice(0, page.chosen.length);
  for (const slider of sliders) slider.max = page.stops.length - 1;
  byId("chain").textContent = chainOf(content);
  byId("measure").textContent = measureOf(content).sentence;
  byId("reached").textContent = measureOf(content).title;
  if (!text.value || page.examples.some(([, example]) => example === text.value)) text.value = examplesOf(name)[0][1];
  page.examples = examplesOf(name);
  byId("examples").replaceChildren(...page.examples.map(([label, example]) => {
    const button = make("button", { type: "button", text: label, title: example });
    button.onclick = () => { text.value = example; classify(); };
    return button;
  }));
  lookAtServer();
  await classifyAll(request);
}

const classify = () => run(page.model ? classifyAll : chooseModels);

/** Ask for the chosen stops first, then for all the others. */
async function classifyAll(request) {
  page.answers = [];
  render();
  if (!text.value.trim()) return hideAnswers();
  const order = new Set([...page.chosen, ...page.stops.keys()]);
  for (const at of order) {
    const body = { input: text.value, model: page.model.name, return_heads: true, ...page.stops[at].fields };
    const { content, stages } = await askAgain("classify", { ...request, body });
    page.answers[at] = { item: content.data[0], stages };
    render();
    if (at === page.chosen[0]) speak();
  }
}

function render() {
  const { model, stops, answers, chosen, cards } = page;
  if (!model) return;
  drawTrade(stops, answers, chosen);
  chosen.forEach((at, place) => {
    const stop = stops[at], slider = sliders[place];
    slider.value = at;
    slider.setAttribute("aria-valuetext", `${stop.name}. ${expectation(stop)}`);
    cards[place] ??= new AnswerCard(byId("answers"), "AB"[place]);
    if (answers[at]) cards[place].draw(model, stop, answers[at]);
    cards[place].waits(!answers[at]);
  });
  for (const card of cards.splice(chosen.length)) card.root.remove();
  renderVersus(...chosen.map(at => answers[at]));
}

function renderVersus(a, b) {
  const line = byId("versus");
  line.hidden = !(a && b);
  if (line.hidden) return;
  const same = a.item.label === b.item.label;
  const [less, more] = a.item.macs <= b.item.macs ? [["A", a], ["B", b]] : [["B", b], ["A", a]];
  const times = more[1].item.macs / less[1].item.macs;
  const work = times < 1.005
    ? "Both take the same work"
    : `${more[0]} takes ${times < 100 ? times.toFixed(1) : Math.round(times).toLocaleString("en")} times the multiply-adds of ${less[0]}`;
  line.textContent = `${work}; ${same ? `both say ${a.item.label}` : `A says ${a.item.label}, B says ${b.item.label}`}.`;
}

function speak() {
  const { item } = page.answers[page.chosen[0]];
  byId("spoken").textContent = `${item.label}, ${percent(item.score)}. ${item.heads.used} of ${item.heads.total} heads, `
    + `${percent(item.macs / item.dense_macs)} of the multiply-adds.`;
}

let typing;
text.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(classify, TYPING_PAUSE);
});
text.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("ask").addEventListener("submit", event => {
  event.preventDefault();
  clearTimeout(typing);
  classify();
});
byId("model").addEventListener("change", ({ target: { value } }) =>
  run(request => chooseModel(value, request)));
byId("key").querySelector("form").addEventListener("submit", event => {
  event.preventDefault();
  useKey(byId("key-value").value);
  byId("key").open = false;
  classify();
});
byId("key").addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  byId("key").open = false;
  byId("key").querySelector("summary").focus();
});
sliders.forEach((slider, place) => slider.addEventListener("input", () => {
  page.chosen[place] = Number(slider.value);
  render();
  if (page.answers[slider.value]) speak();
}));
byId("columns").addEventListener("click", event => {
  const column = event.target.closest("[data-stop]");
  if (!column) return;
  page.chosen[0] = Number(column.dataset.stop);
  render();
});
byId("compare").addEventListener("click", () => {
  const two = page.chosen.length === 1;
  page.chosen = two ? [page.chosen[0], page.stops.length - 1] : page.chosen.slice(0, 1);
  byId("compare").setAttribute("aria-pressed", two);
  byId("slider-b").hidden = !two;
  byId("answers").classList.toggle("two", two);
  render();
});

offerJobs(() => ({ model: page.model.name, ...page.stops[page.chosen[0]].fields }));
const lookAtServer = watch(() => page.model);
run(chooseModels);
