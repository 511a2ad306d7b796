// The live plan as it is drawn: an element below a node's widgets, the same on the canvas and in Nodes 2.0. Whatever it
// shows is text or has a text beside it, and whatever can be pressed is a button.
const WIDGET = "i2v_live_plan";
const GIB = 2 ** 30;
const MIB = 2 ** 20;
const PARTS = ["weights", "activations", "margin"];

document.head.append(
  element("link", { rel: "stylesheet", href: new URL("budget.css", import.meta.url).href }),
);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const amount = (bytes) => (bytes < 0.1 * GIB ? `${(bytes / MIB).toFixed(1)} MiB` : `${(bytes / GIB).toFixed(2)} GiB`);

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
    this.#root.setAttribute("aria-label", "Memory plan");
    const widget = node.addDOMWidget(WIDGET, "i2v_live_plan", this.#root, { serialize: false, hideOnZoom: false });
    widget.serialize = false;
    // As high as its content and no higher: room that is left over goes to others.
    widget.computeSize = () => [0, this.#height];
    widget.computeLayoutSize = undefined;
    new ResizeObserver(() => this.#fitNode()).observe(this.#content);
  }

  showHint(text) {
    this.#show({ state: "", verdict: text });
  }

  // What was shown stays, paler; `text` is said in its place where it is of another model.
  showWaiting(text) {
    if (text) this.#show({ state: "", verdict: text });
    this.#root.classList.add("waiting");
  }

  showPlan({ error, fits, verdict, details, stages, usable_bytes }) {
    if (error) {
      this.#show({ state: "refused", verdict: `${error.problem}: ${error.remedy}.` });
      return;
    }
    this.#show({ state: fits ? "fits" : "refused", verdict, details });
    const largest = Math.max(usable_bytes, ...stages.map((stage) => Math.max(stage.needed_bytes, stage.peak_bytes)));
    this.#bars.append(...stages.flatMap((stage) => bar(stage, usable_bytes, largest)));
    this.#legend.append(...legend(usable_bytes));
    if (!fits) this.#fixes.textContent = "Looking for what would fit …";
  }

  showFixes(fixes) {
    const buttons = fixes.map(({ label, changes }) =>
      element("button", { type: "button", textContent: label, onclick: () => this.#press(changes) }),
    );
    this.#fixes.replaceChildren(...(fixes.length ? ["Would fit:", ...buttons] : []));
  }

  #show({ state, verdict, details = "" }) {
    this.#root.className = `i2v-live ${state}`;
    // Said once by screen readers, and only where it is new.
    if (this.#verdict.textContent !== verdict) this.#verdict.textContent = verdict;
    this.#details.textContent = details;
    this.#bars.replaceChildren();
    this.#legend.replaceChildren();
    this.#fixes.replaceChildren();
  }

  // The button goes with what it mended: its focus stays near.
  #press(changes) {
    this.#verdict.focus({ preventScroll: true });
    this.#apply(changes);
  }

  // A node that was as high as it must be stays so; one that the user made higher keeps its height.
  #fitNode() {
    const height = this.#content.offsetHeight;
    if (!height || height === this.#height) return;
    const node = this.#node;
    const wasTight = node.size[1] <= node.computeSize()[1] + 1;
    this.#height = height;
    const least = node.computeSize()[1];
    node.setSize([node.size[0], wasTight ? least : Math.max(node.size[1], least)]);
    node.graph?.setDirtyCanvas?.(true, true);
  }
}

// Name, bar and amount of one stage.
function bar(stage, usableBytes, largestBytes) {
  const bytes = {
    weights: stage.weights_bytes,
    activations: stage.activation_bytes,
    margin: Math.max(0, stage.needed_bytes - stage.peak_bytes),
  };
  const share = (part) => `${(100 * part) / largestBytes}%`;
  const drawn = element("span", { className: "bar" });
  for (const part of PARTS) drawn.append(element("span", { className: part, style: `width: ${share(bytes[part])}` }));
  drawn.append(element("span", { className: "limit", style: `left: ${share(usableBytes)}` }));
  const freeBytes = usableBytes - stage.needed_bytes;
  const end = freeBytes < 0 ? `${amount(-freeBytes)} too much` : `${amount(freeBytes)} free`;
  drawn.setAttribute("role", "img");
  drawn.setAttribute("aria-label", `${PARTS.map((part) => `${part} ${amount(bytes[part])}`).join(", ")}, ${end}`);
  return [
    element("span", { textContent: stage.stage }),
    drawn,
    element("span", { className: freeBytes < 0 ? "amount over" : "amount", textContent: amount(stage.needed_bytes) }),
  ];
}

function legend(usableBytes) {
  const entry = (name, text) => element("span", {}, element("i", { className: name }), text);
  return [...PARTS.map((part) => entry(part, part)), entry("free", "free"), entry("limit", `limit ${amount(usableBytes)}`)];
}
