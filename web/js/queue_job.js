// View of one job in the queue. For screen readers, everything shown is text or has a text label.
import { api } from "../../../scripts/api.js";
import { amount, element } from "./elements.js";
import { language, messageText, t } from "./i18n.js";

// Actions that are possible in each state of a job.
const ALLOWED = {
  waiting: ["pause", "cancel"],
  paused: ["resume", "cancel"],
  running: ["pause", "cancel"],
  failed: ["retry"],
  cancelled: ["retry"],
  done: [],
};
const ACTIONS = ["pause", "resume", "cancel", "retry"];

// Formats a duration in its largest units, such as "3 hr 20 min".
export function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  const hours = [[Math.floor(minutes / 60), "hour"], [minutes % 60, "minute"]];
  const parts = seconds < 60 ? [[Math.ceil(seconds), "second"]] : minutes < 60 ? [[minutes, "minute"]] : hours;
  const format = ([value, unit]) => Intl.NumberFormat(language(), { style: "unit", unit, unitDisplay: "short" }).format(value);
  return parts.map(format).join(" ");
}

function viewUrl(file) {
  return api.apiURL(`/view?${new URLSearchParams(file)}`);
}

export class JobCard {
  #job;
  #act;
  #picture = element("img", { alt: "" });
  #link = element("a", { target: "_blank", rel: "noopener" }, this.#picture);
  #state = element("span", { className: "state" });
  #prompt = element("p", { className: "prompt" });
  #progress = element("progress");
  #details = element("p", { className: "detail" });
  #memory = element("p", { className: "detail" });
  #problem = element("p", { className: "problem" });
  #reason = element("p");
  #why = element("details");
  #priority = element("input", { type: "number", min: 0.01, max: 1000, step: "any" });
  #buttons = {};
  element;

  // `act(request)` posts an action; `move(job, places)` moves a job by a number of places.
  constructor(job, act, move) {
    this.#act = act;
    for (const action of ACTIONS) {
      const label = t(`${action}Job`);
      this.#buttons[action] = this.#button(label, () => act({ action, job: job.id }), label);
    }
    this.#buttons.up = this.#button("↑", () => move(this.#job, -1), t("queueUp"));
    this.#buttons.down = this.#button("↓", () => move(this.#job, 1), t("queueDown"));
    this.#priority.onchange = () => this.#prioritize();
    const { up, down, pause, resume, cancel, retry } = this.#buttons;
    const priority = element("label", {}, `${t("queuePriority")} `, this.#priority);
    const controls = element("div", { className: "controls" }, priority, up, down, pause, resume, cancel, retry);
    const title = element("p", { className: "name" }, element("b", { textContent: job.name }), " ", this.#state);
    this.#why.append(element("summary", { textContent: t("queueWhy") }), this.#reason);
    const texts = [this.#prompt, this.#progress, this.#details, this.#memory, this.#why, this.#problem];
    const body = element("div", {}, title, ...texts);
    this.element = element("li", {}, this.#link, body, controls);
    this.element.setAttribute("data-job", job.id);
    this.#progress.setAttribute("aria-label", job.name);
  }

  // `first` and `last` say whether the job is the first or last waiting one.
  show(job, { first, last }) {
    this.#job = job;
    this.element.className = job.state;
    this.#state.textContent = job.wish ? t(`${job.wish}Wish`) : t(`${job.state}Job`);
    this.#prompt.textContent = this.#prompt.title = job.prompt;
    this.#showPicture(job);
    this.#showProgress(job);
    this.#memory.textContent = [
      job.size,
      job.predicted_bytes == null ? "" : t("queuePredicted", { amount: amount(job.predicted_bytes) }),
      job.measured_bytes == null ? "" : t("queueMeasured", { amount: amount(job.measured_bytes) }),
    ].filter(Boolean).join(" · ");
    this.#problem.textContent = job.state === "done" ? "" : (job.problem ?? "");
    this.#why.hidden = !job.why;
    this.#reason.textContent = job.why ? messageText(job.why) : "";
    this.#showControls(job, first, last);
  }

  #button(textContent, onclick, label) {
    const button = element("button", { type: "button", textContent, onclick });
    button.setAttribute("aria-label", label);
    button.title = label;
    return button;
  }

  #showPicture({ thumbnail, output, name }) {
    const address = api.apiURL(thumbnail);
    if (this.#picture.getAttribute("src") !== address) this.#picture.setAttribute("src", address);
    if (output) {
      this.#link.href = viewUrl(output);
      this.#link.setAttribute("aria-label", t("queueOpen", { name }));
    } else {
      this.#link.removeAttribute("href");
    }
  }

  #showProgress({ state, stage, done, total, seconds, seconds_left, attempts, pinned }) {
    const isRunning = state === "running";
    this.#progress.hidden = !isRunning;
    this.#progress.max = total || 1;
    this.#progress.value = done;
    const parts = [];
    if (isRunning && stage) parts.push(total ? t("queueProgress", { stage: t(stage), done, total }) : t(stage));
    // There is no estimate for a job that takes longer than predicted.
    if (isRunning && seconds_left) parts.push(t("queueLeft", { time: duration(seconds_left) }));
    if (state === "waiting" && seconds_left != null) parts.push(t("queueTakes", { time: duration(seconds_left) }));
    if (state === "done" && seconds != null) parts.push(t("queueTook", { time: duration(seconds) }));
    if (state === "waiting" && pinned) parts.push(t("queuePinned"));
    if (attempts) parts.push(t("queueAttempts", { count: attempts }));
    this.#details.textContent = parts.join(" · ");
  }

  #showControls({ state, wish: stopRequest, priority }, first, last) {
    const isWaiting = state === "waiting";
    for (const [name, button] of Object.entries(this.#buttons)) {
      const allowed = ["up", "down"].includes(name) ? isWaiting : ALLOWED[state].includes(name) && !stopRequest;
      button.hidden = !allowed;
    }
    this.#buttons.up.disabled = first;
    this.#buttons.down.disabled = last;
    this.#priority.parentElement.hidden = !isWaiting && state !== "paused";
    if (document.activeElement !== this.#priority) this.#priority.value = priority;
  }

  #prioritize() {
    const priority = this.#priority.valueAsNumber;
    if (Number.isNaN(priority)) this.#priority.value = this.#job.priority;
    else this.#act({ action: "prioritize", job: this.#job.id, priority });
  }
}
