// Live plan on VRAM Budget: as widgets change, shows whether it fits, a bar per stage, and buttons for settings that fit.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { language, t, textsLoaded } from "./i18n.js";
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
// Widgets of I2V Loader with Wan's weight files; loaders in workflows from older versions lack them.
const FILE_WIDGETS = ["transformer_file", "low_noise_file"];
// Widgets are polled, since some ways to set a value (typing, undo, a link, a loaded file) trigger no event.
const POLL_MS = 25;
const DEBOUNCE_MS = 50;
const SHOW_WAITING_AFTER_MS = 300;

const watchers = new Set();
const knownModels = new Set();

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const isLinked = (node, name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);

// Returns the model and weight files of the connected loader, or a hint if they are not known before a run.
function modelOf(node) {
  const slot = node.inputs?.findIndex((input) => input.name === "model") ?? -1;
  if (slot < 0 || node.inputs[slot].link == null) return { hint: t("connect") };
  let source = node.getInputNode(slot);
  while (source?.type === "Reroute") source = source.getInputNode(0);
  if (source?.type !== LOADER || ["model", ...FILE_WIDGETS].some((name) => isLinked(source, name))) {
    return { hint: t("modelUnknown") };
  }
  const files = FILE_WIDGETS.map((name) => [name, widgetOf(source, name)?.value]);
  return { loader: { model: widgetOf(source, "model").value, ...Object.fromEntries(files) } };
}

// Returns the values to send to the server, or a hint if they are not known before a run.
function planInputsOf(node) {
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

// Keeps one node's live plan up to date with its widgets.
class Watcher {
  #node;
  #view;
  #lastSeen;
  #lastSent;
  #changedAt = 0;
  #request = new AbortController();

  constructor(node) {
    this.#node = node;
    this.#view = new LivePlan(node, (changes) => this.#apply(changes));
  }

  poll() {
    if (!this.#node.graph) return;
    const inputs = planInputsOf(this.#node);
    const key = JSON.stringify([language(), inputs]);
    if (key !== this.#lastSeen) {
      this.#lastSeen = key;
      this.#changedAt = performance.now();
    }
    if (key === this.#lastSent || performance.now() - this.#changedAt < DEBOUNCE_MS) return;
    this.#lastSent = key;
    this.stop();
    if (inputs.hint) this.#view.showHint(inputs.hint);
    else this.#update(inputs.values);
  }

  // Requests the plan again, since free memory changes with a run.
  invalidate() {
    this.#lastSent = undefined;
  }

  stop() {
    this.#request.abort();
  }

  // An aborted request makes the server stop planning; an answer that still arrives is ignored.
  async #update(values) {
    const { signal } = (this.#request = new AbortController());
    const reading = knownModels.has(values.model) ? undefined : t("reading");
    const timer = setTimeout(() => this.#view.showWaiting(reading), SHOW_WAITING_AFTER_MS);
    try {
      const plan = await fetchPlan(values, false, signal);
      if (signal.aborted) return;
      clearTimeout(timer);
      knownModels.add(values.model);
      this.#view.showPlan(plan);
      if (plan.fits !== false) return;
      const { fixes } = await fetchPlan(values, true, signal);
      if (!signal.aborted) this.#view.showFixes(fixes ?? []);
    } catch (error) {
      if (!signal.aborted) this.#view.showHint(t("noAnswer", { error: error.message }));
    } finally {
      clearTimeout(timer);
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
    await textsLoaded;
    setInterval(() => document.hidden || watchers.forEach((watcher) => watcher.poll()), POLL_MS);
    for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(event, () => watchers.forEach((watcher) => watcher.invalidate()));
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
