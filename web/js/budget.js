// VRAM Budget before it runs: as its widgets change, the verdict, a bar a stage, and buttons for what would fit instead.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { language, t, textsRead } from "./i18n.js";
import { LivePlan } from "./live_plan.js";

const NODE = "I2VVRAMBudget";
const LOADER = "I2VLoader";
const ROUTE = "/i2v_budget/plan";
const WIDGETS = [
  "width",
  "height",
  "frames",
  "guidance",
  "precision",
  "budget",
  "reserve_gib",
  "allow_approximate",
  "plan_for",
];
// Of the loader: where a Wan's weights come from. A loader of an older page has none.
const FILES = ["transformer_file", "low_noise_file"];
// Values are looked at so often: of all ways to set one (typing, undo, a link, a loaded file) some tell nobody.
const LOOK_EVERY_MS = 25;
const SETTLED_AFTER_MS = 50;
const SLOW_AFTER_MS = 300;

const watchers = new Set();
const modelsRead = new Set();

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const isLinked = (node, name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);

// The name of the model that will be loaded and the files of its weights, or why they are not known.
function modelOf(node) {
  const slot = node.inputs?.findIndex((input) => input.name === "model") ?? -1;
  if (slot < 0 || node.inputs[slot].link == null) return { hint: t("connect") };
  let source = node.getInputNode(slot);
  while (source?.type === "Reroute") source = source.getInputNode(0);
  if (source?.type !== LOADER || ["model", ...FILES].some((name) => isLinked(source, name))) {
    return { hint: t("modelUnknown") };
  }
  const files = FILES.map((name) => [name, widgetOf(source, name)?.value]);
  return { loader: { model: widgetOf(source, "model").value, ...Object.fromEntries(files) } };
}

// What to ask the server, or a hint where that cannot be known before a run.
function questionOf(node) {
  const linked = WIDGETS.filter((name) => isLinked(node, name));
  if (linked.length) return { hint: t("linked", { names: linked.join(", ") }) };
  const { loader, hint } = modelOf(node);
  if (hint) return { hint };
  return { values: { ...loader, ...Object.fromEntries(WIDGETS.map((name) => [name, widgetOf(node, name)?.value])) } };
}

async function fetchPlan(values, fixes, signal) {
  const response = await api.fetchApi(ROUTE, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...values, fixes }),
    signal,
  });
  return response.json();
}

// Keeps one node's live plan in step with its widgets.
class Watcher {
  #node;
  #view;
  #seen;
  #asked;
  #changedAt = 0;
  #request = new AbortController();

  constructor(node) {
    this.#node = node;
    this.#view = new LivePlan(node, (changes) => this.#apply(changes));
  }

  look() {
    if (!this.#node.graph) return;
    const question = questionOf(this.#node);
    const key = JSON.stringify([language(), question]);
    if (key !== this.#seen) {
      this.#seen = key;
      this.#changedAt = performance.now();
    }
    if (key === this.#asked || performance.now() - this.#changedAt < SETTLED_AFTER_MS) return;
    this.#asked = key;
    this.stop();
    if (question.hint) this.#view.showHint(question.hint);
    else this.#ask(question.values);
  }

  // Free memory is another after a run.
  askAgain() {
    this.#asked = undefined;
  }

  stop() {
    this.#request.abort();
  }

  // The server gives up what it is asked no more, and an answer that comes all the same is not shown.
  async #ask(values) {
    const { signal } = (this.#request = new AbortController());
    const reading = modelsRead.has(values.model) ? undefined : t("reading");
    const slow = setTimeout(() => this.#view.showWaiting(reading), SLOW_AFTER_MS);
    try {
      const plan = await fetchPlan(values, false, signal);
      if (signal.aborted) return;
      clearTimeout(slow);
      modelsRead.add(values.model);
      this.#view.showPlan(plan);
      if (plan.fits !== false) return;
      const { fixes } = await fetchPlan(values, true, signal);
      if (!signal.aborted) this.#view.showFixes(fixes ?? []);
    } catch (error) {
      if (!signal.aborted) this.#view.showHint(t("noAnswer", { error: error.message }));
    } finally {
      clearTimeout(slow);
    }
  }

  #apply(changes) {
    const { graph } = this.#node;
    graph?.beforeChange?.();
    for (const [name, value] of Object.entries(changes)) {
      const widget = widgetOf(this.#node, name);
      widget.value = value;
      widget.callback?.(value, app.canvas, this.#node);
    }
    graph?.afterChange?.();
    graph?.setDirtyCanvas?.(true, true);
  }
}

app.registerExtension({
  name: "i2v_budget.budget",
  async setup() {
    await textsRead;
    setInterval(() => document.hidden || watchers.forEach((watcher) => watcher.look()), LOOK_EVERY_MS);
    for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(event, () => watchers.forEach((watcher) => watcher.askAgain()));
    }
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const watcher = new Watcher(node);
    watchers.add(watcher);
    const onRemoved = node.onRemoved;
    node.onRemoved = function () {
      watchers.delete(watcher);
      watcher.stop();
      onRemoved?.apply(this, arguments);
    };
  },
});
