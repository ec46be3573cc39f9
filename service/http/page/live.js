// The strip of what the server did lately.

import { ask } from "./api.js";
import { byId, describe, make, milliseconds, percent } from "./dom.js";

const EVERY = 5000;
const SLOTS = 120;
const HEIGHT = 100;

/** Draw the last minutes now and every few seconds, while the page is seen; `modelOf` says whose. */
export function watch(modelOf) {
  let timer;
  async function look() {
    clearTimeout(timer);
    const model = modelOf();
    if (model && !document.hidden) {
      try {
        const { content } = await ask(`playground/recent?model=${encodeURIComponent(model.name)}`);
        if (model !== modelOf()) return;
        draw(content, model.ladder.length);
        byId("live-state").textContent = `${model.name}, every five seconds`;
      } catch (error) {
        byId("live-state").textContent = `Nothing new: ${error.message}`;
      }
    }
    clearTimeout(timer);
    timer = setTimeout(look, EVERY);
  }
  document.addEventListener("visibilitychange", look);
  look();
  return look;
}

function draw({ slots, window }, steps) {
  drawFigures(window);
  drawBudgets(slots, steps);
  drawLatency(slots);
}

function drawFigures(window) {
  const share = value => (value == null ? "–" : percent(value));
  const time = value => (value == null ? "–" : milliseconds(value));
  describe(byId("live-figures"), [
    ["texts", window ? window.texts.toLocaleString("en") : "–"],
    ["heads computed", share(window?.heads_share)],
    ["multiply-adds saved", share(window?.macs_share == null ? null : 1 - window.macs_share)],
    ["median", time(window?.p50_ms)],
    ["99th percentile", time(window?.p99_ms)],
  ]);
}

/** Slots stand at the right, the newest last, so that a young server's strip fills from there. */
const place = (at, count) => SLOTS - count + at;

function drawBudgets(slots, steps) {
  const most = Math.max(1, ...slots.map(slot => slot.texts));
  const bars = slots.flatMap(({ budgets, texts }, at) => {
    let top = HEIGHT * (1 - texts / most);
    return Object.entries(budgets).reverse().map(([step, count]) => {
      const height = (HEIGHT * count) / most;
      const bar = make("rect", {
        x: place(at, slots.length) + 0.1, y: top, width: 0.8, height,
        css: { share: `${(100 * step) / steps}%` },
      });
      top += height;
      return bar;
    });
  });
  const chart = byId("live-budgets");
  chart.setAttribute("viewBox", `0 0 ${SLOTS} ${HEIGHT}`);
  chart.replaceChildren(...bars);
  byId("live-most").replaceChildren(make("span", { text: most.toLocaleString("en"), css: { y: "0%" } }));
  const byStep = new Map();
  for (const { budgets } of slots) {
    for (const [step, count] of Object.entries(budgets)) byStep.set(step, (byStep.get(step) ?? 0) + count);
  }
  const told = Array.from(byStep, ([step, count]) => `${count} at step ${step}`).join(", ");
  chart.setAttribute("aria-label", `Texts of the last minutes: ${told || "none"}`);
  byId("ramp").replaceChildren(make("span", { text: "words alone" }), make("i"), make("span", { text: "all heads" }));
}

/** Times stand on a logarithmic scale, of whole decades. */
function drawLatency(slots) {
  const times = slots.flatMap(slot => [slot.p50_ms, slot.p99_ms]).filter(value => value != null);
  const low = Math.floor(Math.log10(Math.max(0.1, Math.min(1, ...times))));
  const high = Math.ceil(Math.log10(Math.max(10, ...times)));
  const y = value => HEIGHT * (1 - (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low));
  const decades = Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
  const lines = decades.map(value => make("line", { x1: 0, x2: SLOTS, y1: y(value), y2: y(value) }));
  const paths = ["p99", "p50"].map(name => make("path", { class: name, d: line(slots, `${name}_ms`, y) }));
  const chart = byId("live-latency");
  chart.setAttribute("viewBox", `0 0 ${SLOTS} ${HEIGHT}`);
  chart.replaceChildren(...lines, ...paths);
  const last = slots.findLast(slot => slot.p50_ms != null);
  chart.setAttribute("aria-label", last
    ? `Lately a median of ${milliseconds(last.p50_ms)}, a 99th percentile of ${milliseconds(last.p99_ms)}`
    : "No requests in the last minutes");
  byId("live-scale").replaceChildren(...decades.map(value =>
    make("span", { text: value < 1000 ? `${value} ms` : `${value / 1000} s`, css: { y: `${y(value)}%` } })));
}

/** A path with steps as wide as a slot, so that a lone one is seen; broken where nothing was asked. */
function line(slots, name, y) {
  let drawn = false;
  return slots.map((slot, at) => {
    if (slot[name] == null) {
      drawn = false;
      return "";
    }
    const x = place(at, slots.length), height = y(slot[name]).toFixed(2);
    const piece = `${drawn ? "L" : "M"}${x} ${height}L${x + 1} ${height}`;
    drawn = true;
    return piece;
  }).join("");
}
