// The playground: one picture and question under two policies, with the kept tokens drawn over the picture.
import { draw, shape } from "./draw.js";
import { events } from "./events.js";

const PAUSE = 120; // milliseconds of quiet before a change is planned
const UNPRUNED = "off";

const $ = (id) => document.getElementById(id);
const state = { information: null, picture: null, url: null, choice: 0, asking: null };

class Refused extends Error {}

// --- The server -------------------------------------------------------------------------------------------------

/** Send a request; throws `Refused` with the server's own words. */
async function call(path, body, signal) {
  const headers = $("key").value ? { authorization: `Bearer ${$("key").value}` } : {};
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, options);
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    const { error } = JSON.parse(text);
    message = error.message ?? error;
  } catch { /* not JSON */ }
  if (response.status === 401) $("access").open = true;
  throw new Refused(`${response.status}: ${message}`);
}

/** What a failed request means; empty if it was replaced by another. */
function problemOf(error) {
  if (error.name === "AbortError") return "";
  return error instanceof Refused ? error.message : `The server cannot be reached (${error.message}).`;
}

async function connect() {
  try {
    state.information = await (await call("v1/pruning")).json();
  } catch (error) {
    $("server").textContent = problemOf(error);
    return;
  }
  const { models, family, placement } = state.information;
  const limits = [];
  if (!family) limits.push("This model cannot be pruned.");
  else if (placement === "engine") limits.push("This server selects tokens in its engine, so they cannot be drawn.");
  $("server").textContent = [`Model: ${models[0]}.`, ...limits].join(" ");
  for (const side of sides) side.offer(state.information);
  if (state.choice) for (const side of sides) side.plan();
  else await take(document.querySelector("[data-sample]"));
}

const plans = () => state.information?.family && state.information.placement !== "engine";

function bodyFor(policy) {
  const content = [
    { type: "image_url", image_url: { url: state.url } },
    { type: "text", text: $("question").value },
  ];
  return {
    model: state.information.models[0],
    messages: [{ role: "user", content }],
    pruning: policy,
    max_tokens: $("length").valueAsNumber || 64,
    temperature: 0,
  };
}

// --- The two sides ----------------------------------------------------------------------------------------------

class Side {
  constructor(name, method, percent) {
    this.root = $("side").content.cloneNode(true).firstElementChild;
    const part = (selector) => this.root.querySelector(selector);
    Object.assign(this, {
      name,
      method,
      choice: part("select"),
      slider: part("input"),
      share: part("output"),
      canvas: part("canvas"),
      caption: part(".caption"),
      problem: part(".problem"),
      answer: part(".answer"),
    });
    const title = part("h2");
    title.textContent = name;
    title.id = `side-${name}`;
    this.root.setAttribute("aria-labelledby", title.id);
    this.slider.id = `budget-${name}`;
    part(".budget label").htmlFor = this.slider.id;
    this.slider.value = percent;
    this.choice.addEventListener("change", () => this.changed());
    this.slider.addEventListener("input", () => this.changed());
    $("sides").append(this.root);
    this.showBudget();
  }

  /** Fill the list of policies, and keep what is chosen. */
  offer({ presets, methods }) {
    const chosen = this.choice.value || this.method;
    const group = (label, entries) => {
      const element = document.createElement("optgroup");
      element.label = label;
      element.append(...entries.map(([value, text]) => new Option(text, value)));
      return element;
    };
    const names = Object.keys(presets).map((name) => [`preset:${name}`, name === UNPRUNED ? `${name} (unpruned)` : name]);
    const available = methods.filter((method) => method.available).map(({ name }) => [`method:${name}`, name]);
    this.choice.replaceChildren(group("Presets", names), group("Methods, with the budget below", available));
    this.choice.value = chosen;
    if (this.choice.selectedIndex < 0) this.choice.selectedIndex = 0;
    this.showBudget();
  }

  get policy() {
    const [kind, name] = this.choice.value.split(":");
    if (kind === "preset") return name;
    return { method: name, budget: { type: "ratio", keep: this.slider.valueAsNumber / 100 } };
  }

  showBudget() {
    this.share.textContent = `${this.slider.value} %`;
    this.slider.setAttribute("aria-valuetext", this.share.textContent);
    this.root.querySelector(".budget").classList.toggle("unused", !this.choice.value.startsWith("method:"));
  }

  changed() {
    this.showBudget();
    this.plan(PAUSE);
  }

  /** Draw what the policy keeps, and drop the answer to what was asked before; a later call replaces an earlier one. */
  plan(pause = 0) {
    this.planning?.abort();
    this.asking?.abort();
    if (!state.picture || !state.information) return;
    this.answer.textContent = this.problem.textContent = "";
    for (const name of ["prompt", "first", "total"]) this.fact(name);
    this.planning = new AbortController();
    this.planned = plans() ? this.draw(pause, this.planning.signal) : draw(this.canvas, state.picture, null);
  }

  async draw(pause, signal) {
    this.root.setAttribute("aria-busy", "true");
    try {
      await new Promise((done) => setTimeout(done, pause));
      signal.throwIfAborted();
      const { pruning, prompt_tokens } = await (await call("v1/pruning/plan", bodyFor(this.policy), signal)).json();
      draw(this.canvas, state.picture, pruning.images[0].kept);
      this.tell(pruning);
      this.fact("prompt", prompt_tokens);
    } catch (error) {
      this.problem.textContent ||= problemOf(error);
    } finally {
      if (!signal.aborted) this.root.removeAttribute("aria-busy");
    }
  }

  /** Say what a report holds. */
  tell({ images: [image], timings_ms: { encode, ttft, total } }) {
    const { visual_tokens: all, kept_tokens: some, nouns, bypass_reason: bypass, placement } = image;
    const share = `${some} of ${all} tokens`;
    this.fact("tokens", `${some} / ${all}`);
    const notes = [`${share} kept.`];
    if (nouns.length) notes.push(`Guided by: ${nouns.join(", ")}.`);
    if (bypass) notes.push(`Left whole: ${bypass.replaceAll("_", " ")}.`);
    if (some < all && !placement) notes.push("The picture is resized before it is encoded, so no token is dropped.");
    if (image.kept && !shape(image.kept)) notes.push("The tokens of this model have no known positions.");
    if (ttft !== null && placement === "api" && encode === null) notes.push("The picture was encoded before.");
    this.caption.textContent = notes.join(" ");
    this.canvas.setAttribute("aria-label", `The picture under policy ${this.name}: ${share} kept`);
    if (ttft !== null) {
      this.fact("first", `${Math.round(ttft)} ms`);
      this.fact("total", `${Math.round(total)} ms`);
    }
  }

  fact(name, value = "–") {
    this.root.querySelector(`[data-fact="${name}"]`).textContent = value;
  }

  /** Stream an answer. */
  async ask(stop) {
    this.asking?.abort();
    await this.planned;
    this.asking = new AbortController();
    const signal = AbortSignal.any([stop, this.asking.signal]);
    this.answer.textContent = this.problem.textContent = "";
    this.answer.setAttribute("aria-busy", "true"); // screen readers wait for the whole
    try {
      const cache_salt = `${Math.random()}`; // prefill everything, also what was asked before
      const body = { ...bodyFor(this.policy), stream: true, stream_options: { include_usage: true }, cache_salt };
      const response = await call("v1/chat/completions", body, signal);
      for await (const event of events(response.body)) {
        if (event.error) throw new Refused(event.error.message);
        if (signal.aborted) return;
        const text = event.choices[0]?.delta.content ?? "";
        this.answer.append(this.answer.textContent ? text : text.trimStart());
        if (event.usage) this.fact("prompt", event.usage.prompt_tokens);
        if (event.pruning) this.tell(event.pruning);
      }
    } catch (error) {
      this.problem.textContent = problemOf(error);
    } finally {
      this.answer.removeAttribute("aria-busy");
    }
  }
}

const sides = [new Side("A", `preset:${UNPRUNED}`, 50), new Side("B", "method:resprune", 11)];

// --- The picture ------------------------------------------------------------------------------------------------

/** Use a file, which may still be on its way, as the picture; a later call replaces an earlier one. */
async function open(file, name) {
  const choice = ++state.choice;
  let picture, url, problem;
  try {
    const blob = await file;
    url = await dataUrl(blob);
    picture = await createImageBitmap(blob);
  } catch (error) {
    problem = error instanceof Refused ? error.message : `${name} is not a picture that this browser shows.`;
  }
  if (choice !== state.choice) return;
  $("problem").textContent = problem ?? "";
  if (problem) return;
  Object.assign(state, { picture, url });
  $("picture").textContent = `${name}, ${picture.width} × ${picture.height} pixels`;
  for (const side of sides) {
    draw(side.canvas, picture, null);
    side.plan();
  }
}

const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

/** Use a sample, and its question if no other was typed. */
function take(button) {
  const questions = [...document.querySelectorAll("[data-question]")].map((sample) => sample.dataset.question);
  const { sample, question } = button.dataset;
  if (["", ...questions].includes($("question").value)) $("question").value = question;
  return open(call(`playground/${sample}`).then((response) => response.blob()), button.textContent);
}

const firstPicture = (transfer) => [...transfer.files].find((file) => file.type.startsWith("image/"));

$("file").addEventListener("change", ({ target }) => target.files[0] && open(target.files[0], target.files[0].name));
for (const button of document.querySelectorAll("[data-sample]")) button.addEventListener("click", () => take(button));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // such as text, for the question
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind !== "drop") return;
    const file = firstPicture(event.dataTransfer);
    if (file) open(file, file.name);
    else $("problem").textContent = "What was dropped is no picture file.";
  });
}
document.addEventListener("paste", (event) => {
  const file = firstPicture(event.clipboardData);
  if (file) open(file, "The pasted picture");
});

// --- The question -----------------------------------------------------------------------------------------------

$("question").addEventListener("input", () => sides.forEach((side) => side.plan(4 * PAUSE)));
$("key").addEventListener("change", connect);
$("stop").addEventListener("click", () => state.asking?.abort());
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("problem").textContent = "";
  if (!state.information) await connect();
  if (!state.information) return;
  if (!state.picture) {
    $("problem").textContent = "There is no picture yet.";
    return;
  }
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  $("stop").disabled = false;
  if ($("turns").checked) for (const side of sides) await side.ask(asking.signal);
  else await Promise.all(sides.map((side) => side.ask(asking.signal)));
  if (state.asking === asking) $("stop").disabled = true;
});

connect();
