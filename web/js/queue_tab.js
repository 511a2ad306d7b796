// Sidebar tab with the queue of I2V Batch: its jobs and the actions on them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element, useStyle } from "./elements.js";
import { messageText, t, textsLoaded } from "./i18n.js";
import { JobCard, duration } from "./queue_job.js";

const ROUTE = "/i2v_budget/queue";
const POLL_MS = 1000;
const RULES = { weight: "weightRule", "first-come": "firstComeRule" };

class QueueTab {
  #queue = null;
  #cards = new Map();
  #timer;
  #requests = 0;
  #summary = element("p", { className: "summary" });
  #rule = element("p", { className: "rule" });
  #waits = element("ul", { className: "waits" });
  #problem = element("p", { className: "problem" });
  #pause = element("button", { type: "button", onclick: () => this.#toggleQueue() });
  #list = element("ol", { className: "jobs" });
  #more = element("p", { className: "more" });
  #root = element("section", { className: "i2v-queue" });

  constructor(container) {
    this.#summary.setAttribute("role", "status");
    this.#problem.setAttribute("role", "alert");
    this.#list.setAttribute("aria-label", t("queueJobs"));
    this.#root.setAttribute("aria-label", t("queueTitle"));
    const head = element("header", {}, element("h2", { textContent: t("queueTitle") }), this.#pause);
    this.#root.append(head, this.#summary, this.#rule, this.#waits, this.#problem, this.#list, this.#more);
    this.#pause.hidden = true;
    container.replaceChildren(this.#root);
    this.#poll();
  }

  close() {
    clearTimeout(this.#timer);
  }

  async #poll() {
    if (!document.hidden) await this.#request();
    if (this.#root.isConnected) this.#timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  act(values) {
    return this.#request({
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(values),
    });
  }

  // Ignores an answer that arrives after a newer request was sent.
  async #request(options) {
    const number = (this.#requests += 1);
    try {
      const response = await api.fetchApi(ROUTE, options);
      const answer = await response.json();
      if (answer.error) this.#problem.textContent = `${answer.error.problem}: ${answer.error.remedy}.`;
      else if (number === this.#requests) this.#show(answer, options !== undefined);
    } catch (error) {
      setText(this.#summary, t("noAnswer", { error: error.message }));
    }
  }

  #toggleQueue() {
    this.act({ action: this.#queue.paused ? "resume" : "pause" });
  }

  // Moves a job by a number of places, and pins it and all jobs before it at their positions.
  #move(job, places) {
    const order = this.#queue.jobs.filter(({ state }) => state === "waiting");
    const from = order.findIndex(({ id }) => id === job.id);
    const to = from + places;
    if (from < 0 || to < 0 || to >= order.length) return;
    const pinnedCount = order.filter(({ pinned }) => pinned).length;
    order.splice(to, 0, ...order.splice(from, 1));
    const jobs = order.slice(0, Math.max(pinnedCount, to + 1)).map(({ id }) => id);
    this.act({ action: "pin", jobs });
  }

  #show(queue, afterAction) {
    this.#queue = queue;
    // Only an action that succeeded clears the last error, so that polling does not hide it.
    if (afterAction) this.#problem.textContent = "";
    this.#pause.hidden = false;
    this.#pause.textContent = queue.paused ? t("queueResume") : t("queuePause");
    setText(this.#summary, this.#summaryOf(queue));
    const someWait = queue.jobs.some(({ state }) => state === "waiting");
    setText(this.#rule, someWait ? t(RULES[queue.rule]) : "");
    const lines = [...queue.waits, ...queue.remarks.map(messageText)];
    this.#waits.replaceChildren(...lines.map((textContent) => element("li", { textContent })));
    this.#showJobs(queue.jobs);
    const all = Object.values(queue.counts).reduce((sum, count) => sum + count, 0);
    this.#more.textContent = all > queue.jobs.length ? t("queueMore", { count: all - queue.jobs.length }) : "";
  }

  #summaryOf({ paused, counts, seconds_left }) {
    const found = Object.entries(counts).filter(([, count]) => count > 0);
    if (!found.length) return t("queueEmpty");
    const parts = found.map(([state, count]) => `${count} ${t(`${state}Job`)}`);
    if (seconds_left) parts.push(t("queueLeft", { time: duration(seconds_left) }));
    if (paused) parts.push(t("queuePaused"));
    return parts.join(" · ");
  }

  #showJobs(jobs) {
    const waiting = jobs.filter(({ state }) => state === "waiting");
    const focused = document.activeElement;
    const cards = jobs.map((job) => {
      const card = this.#cards.get(job.id) ?? new JobCard(job, (values) => this.act(values), (...by) => this.#move(...by));
      card.show(job, { first: job === waiting[0], last: job === waiting.at(-1) });
      return card;
    });
    this.#cards = new Map(jobs.map((job, index) => [job.id, cards[index]]));
    const elements = cards.map((card) => card.element);
    // Elements are replaced only on a change, since an element that is inserted again loses the focus.
    if (elements.some((it, index) => it !== this.#list.children[index]) || elements.length !== this.#list.children.length) {
      this.#list.replaceChildren(...elements);
    }
    if (this.#list.contains(focused)) keepFocus(focused);
  }
}

// Sets the text only on a change, since screen readers announce every update.
function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// Keeps the focus; if its button has disappeared, another button of the same job gets it.
function keepFocus(focused) {
  const usable = focused.disabled || focused.hidden ? focused.closest("li").querySelector("button:enabled:not([hidden])") : focused;
  if (document.activeElement !== usable) usable?.focus({ preventScroll: true });
}

useStyle("queue_tab.css");

app.registerExtension({
  name: "i2v_budget.queue",
  async setup() {
    let tab;
    await textsLoaded;
    // Pages without a sidebar lack this function; the HTTP routes still work there.
    app.extensionManager?.registerSidebarTab?.({
      id: "i2v_budget.queue",
      icon: "pi pi-video",
      title: t("queueTitle"),
      tooltip: t("queueTooltip"),
      type: "custom",
      // The page calls this again for a tab that is already open.
      render(container) {
        if (container.querySelector(".i2v-queue")) return;
        tab?.close();
        tab = new QueueTab(container);
      },
      destroy() {
        tab?.close();
        tab = undefined;
      },
    });
  },
});
