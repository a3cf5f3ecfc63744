// What comes from models and servers is shown as text or as nodes made here, never as markup.
const $ = (id) => document.getElementById(id);

function h(tag, facts = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false).map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

const key = { get: () => sessionStorage.getItem("playground-key") || "", set: (value) => sessionStorage.setItem("playground-key", value), forget: () => sessionStorage.removeItem("playground-key") };
const button = (text, act, kind = "small") => h("button", { type: "button", class: kind, on: { click: act } }, text);
let turns = [], running = null, pictures = [];

async function copy(pressed, text) {
  const words = pressed.textContent;
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    // Browsers offer pages without TLS no clipboard but this.
    const box = h("textarea", { "aria-hidden": "true" }, text);
    pressed.after(box);
    box.select();
    done = document.execCommand("copy");
    box.remove();
  }
  pressed.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => { pressed.textContent = words; }, 1500);
}

// ── the gateway ──

class Refused extends Error {
  constructor(status, words, wait) { super(`${status}: ${words}`); this.status = status; this.wait = wait; }
}

async function call(method, path, body, signal) {
  const headers = { Authorization: `Bearer ${key.get()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const text = await answer.text();
  let words = text || answer.statusText;
  try { const told = JSON.parse(text).error; words = told?.message || told || words; } catch { /* as it is */ }
  throw new Refused(answer.status, words, Number(answer.headers.get("retry-after-ms")) / 1000 || Number(answer.headers.get("retry-after")) || 0);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r\n", "\n");
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      for (const line of rest.slice(0, end).split("\n")) if (line.startsWith("data:") && !line.includes("[DONE]")) yield JSON.parse(line.slice(5));
    }
  }
}

// ── Markdown, the little that answers use ──

function inline(text) {
  const found = [], pattern = /`([^`]+)`|\*\*([^*]+)\*\*|__([^_]+)__|\*([^*\s][^*]*)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;
  let from = 0;
  for (const match of text.matchAll(pattern)) {
    found.push(text.slice(from, match.index));
    const [, code, strong, strong2, em, words, address] = match;
    if (code !== undefined) found.push(h("code", {}, code));
    else if (strong ?? strong2) found.push(h("strong", {}, ...inline(strong ?? strong2)));
    else if (em !== undefined) found.push(h("em", {}, ...inline(em)));
    else found.push(h("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, words));
    from = match.index + match[0].length;
  }
  return [...found, text.slice(from)];
}

function cells(line) { return line.replace(/^\s*\||\|\s*$/g, "").split("|").map((cell) => cell.trim()); }

function markdown(text) {
  const nodes = [], lines = text.split("\n");
  for (let n = 0; n < lines.length; ) {
    const line = lines[n], fence = /^\s*(```|~~~)/.exec(line), item = /^\s*(?:[-*+]|(\d+)[.)])\s+/.exec(line);
    if (fence) {
      const block = [];
      for (n += 1; n < lines.length && !lines[n].trim().startsWith(fence[1]); n += 1) block.push(lines[n]);
      n += 1;
      nodes.push(h("pre", {}, h("code", {}, block.join("\n"))));
    } else if (/^#{1,6}\s/.test(line)) {
      nodes.push(h(`h${Math.min(6, line.indexOf(" ") + 2)}`, {}, ...inline(line.replace(/^#+\s+/, ""))));
      n += 1;
    } else if (item) {
      const list = h(item[1] ? "ol" : "ul", item[1] ? { start: item[1] } : {});
      for (let next; n < lines.length && (next = /^\s*(?:[-*+]|\d+[.)])\s+(.*)/.exec(lines[n])); n += 1) list.append(h("li", {}, ...inline(next[1])));
      nodes.push(list);
    } else if (line.includes("|") && /^\s*\|?[\s:|-]+\|[\s:|-]*$/.test(lines[n + 1] || "")) {
      const body = [];
      const head = cells(line);
      for (n += 2; n < lines.length && lines[n].includes("|"); n += 1) body.push(h("tr", {}, ...cells(lines[n]).map((cell, at) => h("td", { "data-label": head[at] || "" }, ...inline(cell)))));
      nodes.push(h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ...head.map((cell) => h("th", {}, ...inline(cell))))), h("tbody", {}, ...body))));
    } else if (/^\s*>/.test(line)) {
      const block = [];
      for (; n < lines.length && /^\s*>/.test(lines[n]); n += 1) block.push(lines[n].replace(/^\s*>\s?/, ""));
      nodes.push(h("blockquote", {}, ...markdown(block.join("\n"))));
    } else if (!line.trim()) {
      n += 1;
    } else {
      const block = [];
      for (; n < lines.length && lines[n].trim() && !/^\s*(```|~~~|#{1,6}\s|>|[-*+]\s|\d+[.)]\s)/.test(lines[n]) || !block.length; n += 1) block.push(lines[n]);
      nodes.push(h("p", {}, ...inline(block.join("\n")).flatMap((part) => (typeof part === "string" ? part.split("\n").flatMap((words, at) => (at ? [h("br"), words] : [words])) : [part]))));
    }
  }
  return nodes;
}

// ── asking ──

function messagesUntil(turn, model) {
  const found = $("system").value.trim() ? [{ role: "system", content: $("system").value.trim() }] : [];
  for (const one of turns) {
    const content = one.pictures.length ? [{ type: "text", text: one.prompt }, ...one.pictures.map((url) => ({ type: "image_url", image_url: { url } }))] : one.prompt;
    found.push({ role: "user", content });
    if (one === turn) break;
    const answer = one.answers.find((given) => given.model === model) || one.answers[0];
    if (answer?.text) found.push({ role: "assistant", content: answer.text });
  }
  return found;
}

function bodyOf(turn, model) {
  const body = { model, messages: messagesUntil(turn, model), stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("most").value) body.max_tokens = Number($("most").value);
  if ($("json").checked) body.response_format = { type: "json_object" };
  return body;
}

async function answerWith(turn, answer, signal) {
  const began = performance.now();
  try {
    const reply = await call("POST", "/v1/chat/completions", answer.body, signal);
    for (const [name, header] of [["id", "x-request-id"], ["backend", "x-gateway-backend"], ["requestsLeft", "x-ratelimit-remaining-requests"], ["tokensLeft", "x-ratelimit-remaining-tokens"]]) answer[name] = reply.headers.get(header);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message || "the answer broke off");
      const delta = event.choices?.[0]?.delta || {};
      answer.thinking += delta.reasoning || delta.reasoning_content || "";
      answer.text += delta.content || "";
      if ((delta.content || delta.reasoning || delta.reasoning_content) && answer.first === null) answer.first = performance.now() - began;
      answer.usage = event.usage || answer.usage;
      answer.draw();
    }
  } catch (problem) {
    if (problem.name === "AbortError") answer.stopped = true;
    else answer.problem = problem;
  }
  answer.total = performance.now() - began;
  answer.done = true;
  answer.draw();
}

async function run(turn) {
  const models = [...new Set([$("model").value, $("second").value].filter(Boolean))];
  turn.answers = models.map((model) => ({ model, body: bodyOf(turn, model), text: "", thinking: "", first: null, total: 0, usage: null, done: false, draw: () => {} }));
  draw();
  running = new AbortController();
  busy(true);
  await Promise.all(turn.answers.map((answer) => answerWith(turn, answer, running.signal)));
  running = null;
  busy(false);
  drawActions();
}

function busy(is) {
  $("stop").hidden = !is;
  $("send").disabled = is;
}

// ── showing ──

const examples = {
  curl: (body) => `curl -N ${location.origin}/v1/chat/completions \\\n  -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`,
  Python: (body) => `import json\nimport os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["KEY"])\nbody = json.loads(r'''${JSON.stringify(body).replaceAll("'", "\\u0027")}''')\nfor chunk in client.chat.completions.create(**body):\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
  JavaScript: (body) => `const answer = await fetch("${location.origin}/v1/chat/completions", {\n  method: "POST",\n  headers: { Authorization: \`Bearer \${process.env.KEY}\`, "Content-Type": "application/json" },\n  body: JSON.stringify(${JSON.stringify(body)}),\n});\nfor await (const piece of answer.body.pipeThrough(new TextDecoderStream())) process.stdout.write(piece);`,
};

function factsOf(answer) {
  const facts = [];
  if (answer.backend) facts.push(`backend ${answer.backend}`);
  if (answer.id) facts.push(`request ${answer.id}`);
  if (answer.usage) facts.push(`${answer.usage.prompt_tokens} + ${answer.usage.completion_tokens} tokens`);
  if (answer.first !== null) facts.push(`first token ${Math.round(answer.first)} ms`);
  if (answer.usage && answer.total > answer.first) facts.push(`${(answer.usage.completion_tokens / Math.max(0.001, (answer.total - answer.first) / 1000)).toFixed(1)} tokens/s`);
  if (answer.requestsLeft) facts.push(`left this minute: ${answer.requestsLeft} requests${answer.tokensLeft ? `, ${answer.tokensLeft} tokens` : ""}`);
  if (answer.stopped) facts.push("stopped");
  return facts;
}

function problemOf(turn, answer) {
  const shown = h("p", { class: "bad", role: "alert" }, answer.problem.message);
  if (answer.problem.status !== 429 || !answer.problem.wait) return shown;
  const until = Date.now() + answer.problem.wait * 1000, left = h("span", { class: "countdown" });
  const again = button("Try again", () => retry(turn));
  again.disabled = true;
  const tick = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    left.textContent = seconds > 0 ? ` again in ${seconds} s ` : " ";
    again.disabled = seconds > 0;
    if (seconds > 0 && left.isConnected) setTimeout(tick, 250);
  };
  setTimeout(tick);
  shown.append(left, again);
  return shown;
}

function drawAnswer(turn, answer) {
  const said = h("div", { class: "said" }), thinking = h("details", { class: "thinking", hidden: true }, h("summary", {}, "Thinking"), h("div")), below = h("div");
  const box = h("article", { class: "card answer" }, h("h3", {}, answer.model), thinking, said, below);
  answer.draw = () => {
    said.replaceChildren(...markdown(answer.text));
    thinking.hidden = !answer.thinking;
    thinking.lastChild.textContent = answer.thinking;
    if (!answer.done) return;
    const copied = Object.entries(examples).map(([name, of]) => button(`Copy as ${name}`, (event) => copy(event.target, of(answer.body))));
    below.replaceChildren(...(answer.problem ? [problemOf(turn, answer)] : []), h("div", { class: "facts" }, ...factsOf(answer).map((fact) => h("span", {}, fact))), h("div", { class: "actions" }, button("Copy", (event) => copy(event.target, answer.text)), ...copied));
  };
  answer.draw();
  return box;
}

function draw() {
  $("talk").replaceChildren(...turns.map((turn) => {
    const asked = h("div", { class: "asked" }, turn.prompt, turn.pictures.length ? h("div", { class: "pictures" }, ...turn.pictures.map((src) => h("img", { src, alt: "a picture of yours" }))) : null, h("div", { class: "actions" }));
    turn.actions = asked.lastChild;
    return h("section", { class: "turn" }, asked, h("div", { class: "answers" }, ...turn.answers.map((answer) => drawAnswer(turn, answer))));
  }));
  drawActions();
}

function drawActions() {
  for (const turn of turns) turn.actions.replaceChildren(...(running ? [] : [button("Edit", () => edit(turn)), button("Retry", () => retry(turn))]));
}

function edit(turn) {
  $("prompt").value = turn.prompt;
  pictures = turn.pictures;
  drawPictures();
  turns = turns.slice(0, turns.indexOf(turn));
  draw();
  $("prompt").focus();
}

function retry(turn) {
  turns = turns.slice(0, turns.indexOf(turn) + 1);
  run(turn);
}

function drawPictures() {
  $("pictures").replaceChildren(...pictures.map((src) => h("img", { src, alt: "a picture to send" })));
}

// ── models ──

async function loadModels() {
  const names = (await (await call("GET", "/v1/models")).json()).data.map((model) => model.id);
  const options = () => names.map((name) => h("option", { value: name }, name));
  $("model").replaceChildren(...options());
  $("second").replaceChildren(h("option", { value: "" }, "nothing"), ...options());
  $("embed-model").replaceChildren(...options());
  if (!names.length) throw new Error("This key may use no model that is there.");
  await lookAtModel();
}

async function lookAtModel() {
  $("add-picture").hidden = true;
  const model = $("model").value;
  try {
    const shown = await (await call("POST", "/api/show", { model })).json();
    if ($("model").value === model) $("add-picture").hidden = !(shown.capabilities || []).includes("vision");
  } catch { /* then it cannot see */ }
}

// ── embeddings ──

function similarity(a, b) {
  let dot = 0, one = 0, two = 0;
  for (let n = 0; n < a.length; n += 1) { dot += a[n] * b[n]; one += a[n] * a[n]; two += b[n] * b[n]; }
  return dot / Math.sqrt(one * two || 1);
}

async function embed() {
  const texts = $("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const told = await (await call("POST", "/v1/embeddings", { model: $("embed-model").value, input: texts })).json();
  const vectors = told.data.map((one) => one.embedding);
  const head = h("tr", {}, ...["Text", "Length", "First values", "Like the first"].map((name) => h("th", {}, name)));
  const rows = vectors.map((vector, n) => h("tr", {}, h("td", { class: "wide", "data-label": "Text" }, texts[n]), h("td", { class: "number", "data-label": "Length" }, vector.length), h("td", { class: "wide", "data-label": "First values" }, vector.slice(0, 5).map((value) => value.toFixed(4)).join(", ")), h("td", { class: "number", "data-label": "Like the first" }, similarity(vectors[0], vector).toFixed(4))));
  $("vectors").replaceChildren(h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows))), h("p", { class: "dim" }, told.usage ? `${told.usage.prompt_tokens} tokens` : ""));
}

// ── the page ──

function say(problem) {
  $("problem").textContent = problem ? problem.message : "";
  $("problem").hidden = !problem;
  if (problem?.status === 401) leave();
}

async function trying(work) {
  try { say(null); await work(); } catch (problem) { say(problem); }
}

function show(tab) {
  for (const name of ["chat", "embed"]) $(name).hidden = name !== tab;
  for (const one of $("tabs").children) one.dataset.tab === tab ? one.setAttribute("aria-current", "page") : one.removeAttribute("aria-current");
}

async function enter() {
  await loadModels();
  $("enter").hidden = true;
  for (const id of ["tabs", "leave"]) $(id).hidden = false;
  show("chat");
  $("prompt").focus();
}

function leave() {
  key.forget();
  running?.abort();
  turns = [];
  draw();
  for (const id of ["tabs", "leave", "chat", "embed"]) $(id).hidden = true;
  $("enter").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("enter").addEventListener("submit", (event) => { event.preventDefault(); key.set($("key").value.trim()); trying(enter); });
$("leave").addEventListener("click", leave);
$("tabs").addEventListener("click", (event) => event.target.dataset.tab && show(event.target.dataset.tab));
$("model").addEventListener("change", lookAtModel);
$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !$("prompt").value.trim()) return;
  const turn = { prompt: $("prompt").value.trim(), pictures, answers: [], actions: null };
  turns.push(turn);
  $("prompt").value = "";
  pictures = [];
  drawPictures();
  run(turn).then(() => $("prompt").focus());
});
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("say").requestSubmit(); } });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => { running?.abort(); turns = []; draw(); });
$("picture").addEventListener("change", async (event) => {
  for (const file of event.target.files) {
    pictures = [...pictures, await new Promise((done) => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(file); })];
  }
  event.target.value = "";
  drawPictures();
});
$("embed-form").addEventListener("submit", (event) => { event.preventDefault(); trying(embed); });
if (key.get()) trying(enter);
