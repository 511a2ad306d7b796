// View of the live plan: an element below a node's widgets, the same on the classic canvas and in Nodes 2.0. For screen
// readers, everything shown is text or has a text label, and every action is a button.
import { amount, element, useStyle } from "./elements.js";
import { messageText, t } from "./i18n.js";

const WIDGET = "i2v_live_plan";
const PARTS = ["weights", "activations", "margin"];

useStyle("budget.css");

export class LivePlan {
  #node;
  #apply;
  #height = 0;
  #verdict = element("p", { className: "verdict", tabIndex: -1 });
  #details = element("p", { className: "details" });
  #bars = element("div", { className: "bars" });
  #legend = element("p", { className: "legend" });
  #fixes = element("div", { className: "fixes" });
  #content = element("div", { className: "content" });
  #root = element("div", { className: "i2v-live" }, this.#content);

  constructor(node, apply) {
    this.#node = node;
    this.#apply = apply;
    this.#content.append(this.#verdict, this.#details, this.#bars, this.#legend, this.#fixes);
    this.#verdict.setAttribute("role", "status");
    this.#root.setAttribute("role", "group");
    const widget = node.addDOMWidget(WIDGET, "i2v_live_plan", this.#root, { serialize: false, hideOnZoom: false });
    widget.serialize = false;
    // As high as its content and no higher, so that spare height goes to other widgets.
    widget.computeSize = () => [0, this.#height];
    widget.computeLayoutSize = undefined;
    new ResizeObserver(() => this.#fitNode()).observe(this.#content);
  }

  showHint(text) {
    this.#show({ state: "", verdict: text });
  }

  // Dims the current content; `text` replaces it if it belongs to another model.
  showWaiting(text) {
    if (text) this.#show({ state: "", verdict: text });
    this.#root.classList.add("waiting");
  }

  showPlan(plan) {
    const { error, fits, ways: modes, given_up: approximations, stages, usable_bytes } = plan;
    if (error) {
      this.#show({ state: "refused", verdict: `${error.problem}: ${error.remedy}.` });
      return;
    }
    const details = [...modes.map((mode) => t(mode)), ...approximations.map(messageText)].join(t("comma"));
    this.#show({ state: fits ? "fits" : "refused", verdict: verdictOf(plan), details });
    const largest = Math.max(usable_bytes, ...stages.map((stage) => Math.max(stage.needed_bytes, stage.peak_bytes)));
    this.#bars.append(...stages.flatMap((stage) => bar(stage, usable_bytes, largest)));
    this.#legend.append(...legend(usable_bytes));
    if (!fits) this.#fixes.textContent = t("looking");
  }

  showFixes(fixes) {
    const buttons = fixes.map(({ changes }) =>
      element("button", { type: "button", textContent: labelOf(changes), onclick: () => this.#press(changes) }),
    );
    this.#fixes.replaceChildren(...(fixes.length ? [t("wouldFit"), ...buttons] : []));
  }

  #show({ state, verdict, details = "" }) {
    this.#root.className = `i2v-live ${state}`;
    this.#root.setAttribute("aria-label", t("plan"));
    // Set only on a change, since screen readers announce every update.
    if (this.#verdict.textContent !== verdict) this.#verdict.textContent = verdict;
    this.#details.textContent = details;
    this.#bars.replaceChildren();
    this.#legend.replaceChildren();
    this.#fixes.replaceChildren();
  }

  // The pressed button disappears with the problem it fixes, so move the focus to the verdict.
  #press(changes) {
    this.#verdict.focus({ preventScroll: true });
    this.#apply(changes);
  }

  // Resizes a node that had its minimum height; a node that the user made higher keeps its height.
  #fitNode() {
    const height = this.#content.offsetHeight;
    if (!height || height === this.#height) return;
    const node = this.#node;
    const hadMinHeight = node.size[1] <= node.computeSize()[1] + 1;
    this.#height = height;
    const minHeight = node.computeSize()[1];
    node.setSize([node.size[0], hadMinHeight ? minHeight : Math.max(node.size[1], minHeight)]);
    node.graph?.setDirtyCanvas?.(true, true);
  }
}

function verdictOf({ fits, binding_stage, stages, usable_bytes, device }) {
  const needed = amount(stages.find(({ stage }) => stage === binding_stage).needed_bytes);
  return t(fits ? "fits" : "doesNotFit", { stage: t(binding_stage), needed, usable: amount(usable_bytes), device });
}

// Labels of the buttons, by the first widget that a button sets.
const LABELS = {
  frames: ({ frames }) => t(frames === 1 ? "oneFrame" : "frames", { frames }),
  width: ({ width, height }) => `${width}×${height}`,
  allow_approximate: () => t("approximate"),
  precision: () => t("precision"),
  budget: ({ budget }) => t("budget", { budget }),
};
const labelOf = (changes) => LABELS[Object.keys(changes)[0]](changes);

// Builds name, bar and amount of one stage.
function bar(stage, usableBytes, largestBytes) {
  const bytes = {
    weights: stage.weights_bytes,
    activations: stage.activation_bytes,
    margin: Math.max(0, stage.needed_bytes - stage.peak_bytes),
  };
  const share = (part) => `${(100 * part) / largestBytes}%`;
  const track = element("span", { className: "bar" });
  for (const part of PARTS) track.append(element("span", { className: part, style: `width: ${share(bytes[part])}` }));
  track.append(element("span", { className: "limit", style: `left: ${share(usableBytes)}` }));
  const freeBytes = usableBytes - stage.needed_bytes;
  const rest = freeBytes < 0 ? t("tooMuch", { amount: amount(-freeBytes) }) : t("left", { amount: amount(freeBytes) });
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", [...PARTS.map((part) => `${t(part)} ${amount(bytes[part])}`), rest].join(t("comma")));
  return [
    element("span", { textContent: t(stage.stage) }),
    track,
    element("span", { className: freeBytes < 0 ? "amount over" : "amount", textContent: amount(stage.needed_bytes) }),
  ];
}

function legend(usableBytes) {
  const entry = (name, text) => element("span", {}, element("i", { className: name }), text);
  return [
    ...PARTS.map((part) => entry(part, t(part))),
    entry("free", t("free")),
    entry("limit", t("limit", { amount: amount(usableBytes) })),
  ];
}
