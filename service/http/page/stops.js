// Where the quality slider stops.

import { percent } from "./dom.js";

/**
 * The stops for a model, by its card: from `fast` over numbers of points to `best`, then every head.
 * A model without calibration has its ladder instead.
 *
 * `name` says what a stop is, `tick` does in short; `fields` are those of a request; `reached` (in the card's measure) and `share` are what
 * calibration measured on average.
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
    const { name, points_lost: lost, macs_share: share } = point;
    // A number gets the cheapest level that gives up no more, so it must give up less than all before.
    if (name || (lost >= 0 && lost < least)) {
      stops.push({
        name: name ?? (lost ? `${lost.toFixed(2)} points given up` : "no points given up"),
        tick: name ?? (lost ? `−${lost.toFixed(2)}` : "±0"),
        named: Boolean(name),
        fields: { quality: name ?? lost },
        reached: point[card.measure], measure: card.measure, share,
      });
    }
    least = Math.min(least, lost);
    if (name === "best") break;
  }
  return [...stops, every];
}

function step(card, index, name, tick) {
  const measured = card.frontier.find(at => at.step === index);
  const full = index === card.ladder.length;
  const heads = index && Math.max(...card.ladder[index - 1]);
  return {
    name, tick, named: true, fields: { heads }, measure: card.measure, share: measured?.macs_share,
    reached: card.measure === "accuracy" ? measured?.accuracy : full ? 1 : null,
  };
}

const MEASURES = {
  accuracy: {
    title: "Right on average",
    stop: "right",
    sentence: "Accuracy is the share of held-out texts that a quality answers right.",
  },
  agreement: {
    title: "As every head",
    stop: "the same answer as every head",
    sentence: "Agreement is the share of held-out texts that a quality answers as every head would, right or wrong.",
  },
};

/** What the figures of a model's qualities mean, in one sentence, and the title of their column. */
export const measureOf = card => MEASURES[card.measure];

export function expectation({ reached, measure, share }) {
  if (reached == null) return "Not calibrated";
  return `On average ${MEASURES[measure].stop} on ${percent(reached)} of the texts, at ${percent(share ?? 1)} of the work of all heads`;
}

/** How a text goes through a model's chain, in one sentence; empty where it has none. */
export function chainOf({ chain, exit_margin: margin }) {
  if (!chain) return "";
  const exit = margin ? ` Step 0 must be more confident than the others, by ${margin}.` : "";
  return `Steps ${chain.join(" → ")}: a text stops at the first answer that is confident enough.${exit} f_o predicts which step that is and skips those between.`;
}
