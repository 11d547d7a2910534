// The gateway's page: a chat over /v1/chat/completions, and a view of workers and queues.

import { readEvents } from "./events.js";

const STATUS_MS = 1000;
const POSITION_MS = 500;
const SAVED = "worker-gateway-parameters";

const element = (id) => document.getElementById(id);
const [list, notice, progress, prompt] = ["messages", "notice", "progress", "prompt"].map(element);
const parameterForm = element("parameter-form");

/** Messages of the conversation in OpenAI's form, without the system prompt. */
let conversation = [];
/** The AbortController of the running request, or null. */
let running = null;

// Parameters

/** All parameters; `key` is the API key, which is kept for as long as the page only. */
const parameters = () => Object.fromEntries(new FormData(parameterForm));

function headers(more = {}) {
  const { key } = parameters();
  return { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...more };
}

function save() {
  const { key, ...saved } = parameters();
  try {
    localStorage.setItem(SAVED, JSON.stringify(saved));
  } catch {
    // Storage is refused in some private windows; the parameters last as long as the page.
  }
}

function restore() {
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem(SAVED)) ?? {};
  } catch {
    return saved;
  }
  for (const [name, value] of Object.entries(saved)) {
    if (name !== "model" && name !== "key" && parameterForm.elements[name]) parameterForm.elements[name].value = value;
  }
  return saved;
}

async function loadModels() {
  const select = element("model");
  const chosen = select.value || restore().model;
  try {
    const models = (await getJson("v1/models")).data.map((model) => model.id);
    select.replaceChildren(...models.map((model) => new Option(model, model, false, model === chosen)));
    show(notice, models.length ? "" : "No worker serves a model. Start one with: worker run --model NAME");
  } catch (error) {
    show(notice, error.message);
  }
}

/** The body of a request with the conversation; empty parameters are left to the gateway. */
function requestBody() {
  const { model, system, reasoning_effort, ...values } = parameters();
  delete values.key;
  const numbers = Object.entries(values).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]);
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    ...Object.fromEntries(numbers),
    ...(reasoning_effort ? { reasoning_effort } : {}),
  };
}

// Requests

async function refused(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error?.message ?? message;
  } catch {
    // The body is no JSON, for example that of a proxy.
  }
  return new Error(message);
}

async function getJson(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await refused(response);
  return response.json();
}

const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Yield the chunks of a streamed answer. Aborting the signal cancels the job. */
async function* chunks(body, requestId, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", "X-Request-Id": requestId }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refused(response);
  for await (const event of readEvents(response.body)) {
    if (event.data === "[DONE]") return;
    const chunk = JSON.parse(event.data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The connection to the gateway was lost.");
}

// Chat

function show(target, text) {
  target.textContent = text;
  target.hidden = !text;
}

function addMessage(role) {
  const item = document.createElement("li");
  item.className = role;
  const label = Object.assign(document.createElement("span"), { className: "role", textContent: role });
  const text = Object.assign(document.createElement("p"), { className: "text" });
  item.append(label, text);
  list.append(item);
  return { item, text };
}

function addReasoning(item, text) {
  const details = document.createElement("details");
  const paragraph = document.createElement("p");
  details.append(Object.assign(document.createElement("summary"), { textContent: "Reasoning" }), paragraph);
  item.insertBefore(details, text);
  return paragraph;
}

/** One answer that is being received: its text, its figures, its place in the page. */
class Answer {
  constructor() {
    Object.assign(this, addMessage("assistant"), { content: "", began: performance.now(), first: 0, tokens: 0, finish: null });
  }

  add(chunk) {
    const [choice] = chunk.choices;
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    if (!choice) return;
    const { content, reasoning_content, tool_calls } = choice.delta;
    if (!content && !reasoning_content && !tool_calls && !choice.finish_reason) return;
    this.first ||= performance.now();
    if (content) {
      this.content += content;
      this.text.append(content);
    }
    if (reasoning_content) (this.reasoning ??= addReasoning(this.item, this.text)).append(reasoning_content);
    if (!chunk.usage && (content || reasoning_content)) this.tokens += 1;
    this.finish = choice.finish_reason ?? this.finish;
    list.scrollTop = list.scrollHeight;
  }

  get figures() {
    const seconds = (performance.now() - this.first) / 1000;
    const rate = seconds > 0.05 && this.tokens > 1 ? `, ${((this.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    return `${this.tokens} tokens${rate}, first after ${Math.round(this.first - this.began)} ms`;
  }

  /** Replace the live figures by the final ones, below the text. */
  close(reason) {
    const text = this.first ? `${this.figures}, ${reason}` : reason;
    this.item.append(Object.assign(document.createElement("p"), { className: "figures", textContent: text }));
  }
}

/** Show the place in the queue until the first token arrives. */
async function showPosition(answer, requestId, model, signal) {
  const query = new URLSearchParams({ request: requestId, model });
  while (!signal.aborted && !answer.first) {
    let text = "waiting for the first token";
    try {
      const { position, waiting } = await getJson(`page/position?${query}`);
      if (position !== null) text = `position ${position} of ${waiting} in the queue`;
    } catch {
      // The stream itself reports errors.
    }
    if (!signal.aborted && !answer.first) progress.textContent = text;
    await new Promise((resolve) => setTimeout(resolve, POSITION_MS));
  }
}

function setRunning(controller) {
  running = controller;
  element("stop").hidden = !controller;
  element("send").disabled = element("clear").disabled = Boolean(controller);
  list.setAttribute("aria-busy", String(Boolean(controller)));
}

async function send(text) {
  show(notice, "");
  addMessage("user").text.textContent = text;
  conversation.push({ role: "user", content: text });
  const body = requestBody();
  const answer = new Answer();
  const controller = new AbortController();
  setRunning(controller);
  const requestId = newId();
  showPosition(answer, requestId, body.model, controller.signal);
  let reason = "";
  try {
    for await (const chunk of chunks(body, requestId, controller.signal)) {
      answer.add(chunk);
      if (answer.first) progress.textContent = answer.figures;
    }
    reason = `finish reason ${answer.finish}`;
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "failed";
    if (reason === "failed") show(notice, error.message);
  }
  controller.abort();
  if (answer.content) conversation.push({ role: "assistant", content: answer.content });
  else conversation.pop(); // a message without an answer is not sent again with the next one
  answer.close(reason);
  progress.textContent = "";
  setRunning(null);
  prompt.focus();
}

// Workers and queues

function cell(content, className = "") {
  const made = Object.assign(document.createElement("td"), { className });
  made.append(content);
  return made;
}

const count = (value) => cell(value ?? "–", "number");

function share(used, total, label) {
  if (!total) return cell("–");
  const meter = Object.assign(document.createElement("meter"), { max: total, value: used, title: label });
  meter.setAttribute("aria-label", label);
  const made = cell(meter);
  made.append(` ${label}`);
  return made;
}

const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);

function workerRow(worker) {
  const total = worker.vram_used + worker.vram_free;
  const row = document.createElement("tr");
  row.append(
    cell(worker.worker),
    cell(worker.degraded ? `${worker.state}, degraded` : worker.state),
    cell(worker.model),
    cell(worker.queue),
    count(worker.running),
    count(worker.waiting),
    count(worker.jobs),
    share(worker.kv_blocks_used, worker.kv_blocks, `${worker.kv_blocks_used} of ${worker.kv_blocks}`),
    share(worker.vram_used, total, `${gib(worker.vram_used)} of ${gib(total)} GiB`),
  );
  return row;
}

function queueRow(queue) {
  const row = document.createElement("tr");
  row.append(cell(queue.queue), count(queue.length), count(queue.dead));
  return row;
}

function fill(id, rows, empty) {
  const body = element(id).tBodies[0];
  if (rows.length) return body.replaceChildren(...rows);
  const none = cell(empty);
  none.colSpan = 9;
  const row = document.createElement("tr");
  row.append(none);
  return body.replaceChildren(row);
}

async function showStatus() {
  while (!element("view-status").hidden) {
    try {
      const { workers, queues } = await getJson("page/status");
      fill("workers", workers.map(workerRow), "No live workers.");
      fill("queues", queues.map(queueRow), "No queues.");
      show(element("status-notice"), "");
    } catch (error) {
      show(element("status-notice"), error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, STATUS_MS));
  }
}

// Events

const tabs = [...document.querySelectorAll('[role="tab"]')];

function openTab(chosen) {
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    element(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  if (chosen.id === "tab-status") showStatus();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => tab.getAttribute("aria-selected") === "true" || openTab(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    openTab(next);
  });
}

element("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running || !parameterForm.reportValidity()) return;
  prompt.value = "";
  send(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("prompt-form").requestSubmit();
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  conversation = [];
  list.replaceChildren();
  show(notice, "");
  prompt.focus();
});
parameterForm.addEventListener("change", (event) => {
  save();
  if (event.target.name === "key") loadModels();
});
parameterForm.addEventListener("submit", (event) => event.preventDefault());

restore();
loadModels();
