"use strict";

const byId = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("button")];
const keys = { ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip", u: "undo" };
const said = { left: "A is better", right: "B is better", tie: "a tie", skip: "skipped" };
const refresh = 2000; // ms between looks at what is new

// A tab holds a pair, also after it was loaded again; a name answers, and takes its answers back.
const kept = (storage, key) => {
  if (!storage.getItem(key)) storage.setItem(key, "browser-" + crypto.getRandomValues(new Uint32Array(1))[0].toString(36));
  return storage.getItem(key);
};
const holder = kept(sessionStorage, "holder");
byId("name").value = kept(localStorage, "name");

let pair = null; // the one that is shown
let busy = false;

// ---- the server ----

async function call(path, fields) {
  const options = { headers: { "Content-Type": "application/json" }, method: fields ? "POST" : "GET" };
  if (fields) options.body = JSON.stringify(fields);
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer. Is r2m label still running?");
  }
  const body = await response.json().catch(() => ({ error: "the server failed: " + response.status }));
  if (!response.ok) throw Object.assign(new Error(body.error), { status: response.status });
  return body;
}

// One request at a time; what goes wrong is shown, and the pair stays on the screen.
async function request(path, fields, status, failed) {
  if (busy) return;
  setBusy(true);
  let refused;
  try {
    const body = await call(path, { holder, by: byId("name").value.trim() || kept(localStorage, "name"), ...fields });
    byId("alert").textContent = "";
    byId("status").textContent = status;
    showCounts(body.counts);
    showPair(body.pair);
  } catch (error) {
    byId("alert").textContent = failed + error.message;
    refused = error.status === 409 && path === "/api/answer" && error.message;
  } finally {
    setBusy(false);
  }
  if (refused) await request("/api/pair", {}, "Not saved: " + refused + ". This is the next one.", "");
}

const next = () => request("/api/pair", {}, byId("status").textContent, "");

function answer(choice) {
  if (!pair) return;
  const fields = { id: pair.id, choice, left: pair.left_is };
  return request("/api/answer", fields, "Saved: " + said[choice] + ".", "Not saved: ");
}

const undo = () => request("/api/undo", {}, "Taken back. Answer this pair again.", "Not taken back: ");

async function look() {
  try {
    if (busy || document.hidden) return;
    if (!pair) await next();
    else showCounts((await call("/api/counts")).counts);
  } catch {
    // said when the next answer cannot be saved
  } finally {
    setTimeout(look, refresh);
  }
}

// ---- the page ----

function setBusy(now) {
  busy = now;
  for (const button of buttons) button.disabled = busy || (!pair && button.id !== "undo");
}

function showCounts({ waiting, answered, agreed, round, rounds }) {
  const parts = [];
  if (round !== null) parts.push("round " + round + (rounds === null ? "" : " of " + rounds));
  if (round !== null && round === rounds) parts.push("the run has ended, nothing learns from answers now");
  parts.push(waiting + (waiting === 1 ? " pair waits" : " pairs wait"));
  if (agreed !== null) {
    const answers = answered === 1 ? "1 answer" : answered + " answers";
    parts.push("the reward model agreed with " + Math.round(100 * agreed) + " % of " + answers);
  }
  byId("counts").textContent = parts.join(" · ");
}

function showPair(shown) {
  const isNew = shown && (!pair || shown.id !== pair.id);
  pair = shown;
  byId("pair").hidden = !pair;
  byId("none").hidden = Boolean(pair);
  if (!isNew) return;
  byId("prompt-title").textContent = "Prompt, round " + pair.round;
  const messages = typeof pair.prompt === "string" ? [pair.prompt] : pair.prompt.flatMap(messageParts);
  fill("prompt", messages);
  fill("left", [pair.left]);
  fill("right", [pair.right]);
  byId("prompt-title").focus(); // a screen reader goes on from here
}

function messageParts(message) {
  const role = document.createElement("span");
  role.className = "role";
  role.textContent = message.role;
  return [role, typeof message.content === "string" ? message.content : JSON.stringify(message.content)];
}

// Texts of a model become text nodes, never markup.
function fill(id, parts) {
  const place = byId(id);
  place.replaceChildren(...parts.flatMap((part) => (typeof part === "string" ? textParts(part) : [part])));
  place.scrollTop = 0;
}

// Text, and what stands between fences of ``` in a monospaced block.
function textParts(text) {
  if (!text.trim()) {
    const empty = document.createElement("span");
    empty.className = "empty";
    empty.textContent = "(empty)";
    return [empty];
  }
  return text.split(/^(```[^]*?^```[^\S\n]*(?:\n|$))/m).filter(Boolean).map((part) => {
    if (!part.startsWith("```")) return document.createTextNode(part);
    const block = document.createElement("code");
    block.className = "block";
    block.textContent = part;
    return block;
  });
}

for (const button of buttons) {
  button.addEventListener("click", () => (button.id === "undo" ? undo() : answer(button.dataset.choice)));
}
byId("name").addEventListener("change", (event) => localStorage.setItem("name", event.target.value.trim()));
document.addEventListener("keydown", (event) => {
  const choice = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const elsewhere = event.target === byId("name") || event.ctrlKey || event.altKey || event.metaKey;
  if (!choice || elsewhere || event.repeat) return; // a key that is held down answers one pair
  event.preventDefault();
  if (choice === "undo") undo();
  else answer(choice);
});

setBusy(false);
next().then(look);
