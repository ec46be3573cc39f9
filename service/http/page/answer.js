// One answer: labels, heads, multiply-adds, stages.

import { byId, describe, make, milliseconds, multiplyAdds, part, percent } from "./dom.js";
import { expectation } from "./stops.js";

const MOST_LABELS = 6;
const STAGES = ["tokenize", "budget", "queue", "compute", "other"];
const listed = steps => steps.join(", ").replace(/, (\d+)$/, " and $1");

export class AnswerCard {
  constructor(parent, letter) {
    parent.append(byId("answer").content.cloneNode(true));
    this.root = parent.lastElementChild;
    this.root.hidden = true;
    const badge = part(this.root, "badge");
    badge.textContent = letter;
    badge.classList.add(letter.toLowerCase());
  }

  /** Say whether what stands here is of another request. */
  waits(whether) {
    this.root.classList.toggle("waiting", whether);
  }

  draw(card, stop, { item, stages }) {
    this.root.hidden = false;
    this.put("quality", stop.name);
    this.put("expected", expectation(stop));
    this.put("label", item.label);
    this.put("score", percent(item.score));
    this.drawLabels(item.labels);
    this.drawHeads(card, item);
    this.drawSteps(card, stop, item.heads);
    this.drawStages(stages);
  }

  put(name, text) {
    part(this.root, name).textContent = text;
  }

  drawLabels(labels) {
    const shown = labels.slice(0, MOST_LABELS), rest = labels.slice(MOST_LABELS);
    part(this.root, "bars").replaceChildren(...shown.map(({ label, score }) =>
      make("li", { css: { share: `${100 * score}%` } },
        make("span", { text: label }), make("span", { text: percent(score) }))));
    this.put("others", rest.length ? `and ${rest.length} more labels` : "");
  }

  drawHeads({ layers, heads_per_layer: width }, { heads, macs, dense_macs: dense, tokens }) {
    const lit = Array.from({ length: layers }, (_, layer) => new Set(heads.per_layer?.[layer] ?? []));
    const count = lit.reduce((sum, layer) => sum + layer.size, 0);
    const grid = part(this.root, "grid");
    if (grid.children.length !== layers * (width + 1)) {
      grid.style.setProperty("--width", width);
      grid.replaceChildren(...lit.flatMap((_, layer) => [
        make("b", { text: layer + 1 }),
        ...Array.from({ length: width }, () => make("i", { css: { layer } })),
      ]));
    }
    grid.querySelectorAll("i").forEach((dot, at) => {
      dot.classList.toggle("lit", lit[Math.floor(at / width)].has(at % width));
    });
    const each = lit.map((layer, at) => `layer ${at + 1}: ${layer.size}`).join(", ");
    grid.setAttribute("aria-label", `Heads lit of ${width} in each layer: ${each}`);
    // A text that ran several steps has paid for all of them.
    const before = heads.used - count;
    this.put("caption", count === 0
      ? "No head lit up: the words alone told"
      : `${count} of ${heads.total} heads lit up, by layer${before ? `, after ${before} in earlier steps` : ""}`);
    describe(part(this.root, "figures"), [
      [`of ${heads.total} heads used`, heads.used],
      ["of the multiply-adds saved", percent(1 - macs / dense)],
      [`of ${multiplyAdds(dense)} multiply-adds`, multiplyAdds(macs)],
      [tokens === 1 ? "token read" : "tokens read", tokens],
    ]);
  }

  /** Draw the links of the chain: those that ran, and the one that f_o predicted. */
  drawSteps({ chain }, { fields }, { steps, predicted }) {
    const links = [...new Set([...(chain ?? []), ...steps])].sort((a, b) => a - b);
    part(this.root, "way").replaceChildren(...links.map(step => {
      const link = make("li", { text: step });
      link.classList.toggle("ran", steps.includes(step));
      link.classList.toggle("predicted", step === predicted && fields.heads === undefined);
      return link;
    }));
    const ran = `step${steps.length > 1 ? "s" : ""} ${listed(steps)} ran`;
    this.put("steps", fields.heads !== undefined ? `As asked, ${ran}`
      : predicted === null ? `Every layer decided for itself: ${ran}`
        : predicted === 0 ? "Step 0 answered, so no other step ran"
          : `f_o predicted step ${predicted}; ${ran}`);
  }

  drawStages({ total = 0, ...stages }) {
    const known = Object.values(stages).reduce((sum, duration) => sum + duration, 0);
    const durations = { ...stages, other: Math.max(0, total - known) };
    this.put("total", `${milliseconds(total)} in the server`);
    part(this.root, "stack").replaceChildren(...STAGES.map(name =>
      make("i", { class: name, css: { share: durations[name] ?? 0 } })));
    part(this.root, "stages").replaceChildren(...STAGES.map(name =>
      make("li", { class: name }, make("span", { text: name }),
        make("span", { text: milliseconds(durations[name] ?? 0) }))));
  }
}
