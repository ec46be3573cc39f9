// Where the quality slider stops.

import { percent } from "./dom.js";

/**
 * The stops for a model, by its card: from `fast` over numbers of points to `best`, then every head.
 * A model without calibration has its ladder instead.
 *
 * `name` says what a stop is, `tick` does in short; `fields` are those of a request, `accuracy` and `share` what calibration measured on average.
 */
export function stopsOf(card) {
  const every = step(card, card.ladder.length, "every head", "all");
  const points = card.operating_points;
  const from = points.findIndex(point => point.name === "fast");
  if (from < 0) {
    const first = card.step_0 ? 0 : 1;
    const steps = Array.from({ length: card.ladder.length - first }, (_, i) => i + first);
    return [...steps.map(k => step(card, k, `step ${k}`, k)), every];
  }
  const stops = [];
  let least = Infinity;
  for (const point of points.slice(from)) {
    const { name, points_lost: lost, accuracy, macs_share: share } = point;
    // A number gets the cheapest rule that gives up no more, so it must give up less than all before.
    if (name || (lost >= 0 && lost < least)) {
      stops.push({
        name: name ?? (lost ? `${lost.toFixed(2)} points given up` : "no points given up"),
        tick: name ?? (lost ? `−${lost.toFixed(2)}` : "±0"),
        named: Boolean(name),
        fields: { quality: name ?? lost },
        accuracy, share,
      });
    }
    least = Math.min(least, lost);
    if (name === "best") break;
  }
  return [...stops, every];
}

function step(card, heads, name, tick) {
  const measured = card.frontier.find(at => at.step === heads);
  return { name, tick, named: true, fields: { heads }, accuracy: measured?.accuracy, share: measured?.macs_share };
}

export function expectation({ accuracy, share }) {
  if (accuracy === undefined) return "Not calibrated";
  return `On average right on ${percent(accuracy)} of the texts, at ${percent(share)} of the work of all heads`;
}
