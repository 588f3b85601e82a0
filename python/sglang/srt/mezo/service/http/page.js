"use strict";

const POLL_MS = 2000;
const PATIENCE_MS = 10000;
const MOST_JOBS = 100;
const COMPARABLE = 20; // requests on either side, for a ratio to be shown
const LIVE = ["validating_files", "queued", "running", "paused"];
const ACTIONS = {
  pause: ["queued", "running"],
  resume: ["paused"],
  cancel: LIVE,
};
const ROOT = new URL("../", location.href);

const $ = id => document.getElementById(id);

// What is known so far. curves: for each job the lines of its metrics, one a step; files: their names by id; asked: for a key.
const known = {limit: 20, now: Date.now() / 1000, modelName: "", asked: false, curves: new Map(), files: new Map()};

const charts = {
  loss: new Chart($("loss"), {x: count, y: decimal, at: step => `step ${step}`, empty: "No step has been taken so far."}),
  accuracy: new Chart($("accuracy"), {
    x: count, y: percent, at: step => `step ${step}`,
    empty: "Nothing to show: it takes a validation file whose rows have options to choose from.",
  }),
  ttft: new Chart($("ttft"), {x: clock, y: duration, at: String, step: 60, empty: "No request in the last half hour."}),
  tpot: new Chart($("tpot"), {
    x: clock, y: duration, at: String, step: 60, empty: "No request of two or more tokens in the last half hour.",
  }),
};

// --- words and numbers ---------------------------------------------------------------------------------------------------

function count(value) { return Number(value).toLocaleString("en"); }
function decimal(value) { return value == null ? "" : value.toFixed(Math.abs(value) < 10 ? 4 : 2).replace(/(\.\d\d)0+$/, "$1"); }
function percent(value) { return value == null ? "" : `${(100 * value).toFixed(1).replace(/\.0$/, "")} %`; }
function clock(seconds) { return new Date(seconds * 1000).toLocaleTimeString("en-GB", {hour: "2-digit", minute: "2-digit"}); }
function when(seconds) { return new Date(seconds * 1000).toLocaleString("sv"); }

function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds >= 1 || seconds === 0) return `${Number(seconds.toPrecision(3))} s`;
  return `${Number((1000 * seconds).toPrecision(3))} ms`;
}

function elapsed(seconds) {
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(Math.max(0, seconds))} s`;
}

// --- the server ----------------------------------------------------------------------------------------------------------

// status: of the response, 0 where there was none.
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
    this.refused = status === 401 || status === 403;
  }
}

function key(changes) {
  return (changes && sessionStorage.getItem("admin-key")) || sessionStorage.getItem("api-key");
}

async function ask(path, changes = false) {
  const headers = key(changes) ? {Authorization: `Bearer ${key(changes)}`} : {};
  const response = await fetch(new URL(path, ROOT), {
    method: changes ? "POST" : "GET", headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(PATIENCE_MS),
  }).catch(error => { throw new Refusal(0, error.message); });
  known.now = (Date.parse(response.headers.get("Date")) || Date.now()) / 1000;
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Refusal(response.status, body?.error?.message ?? body?.error ?? response.statusText);
  return body;
}

async function poll() {
  if (document.hidden) return;
  try {
    await refresh();
    say("problem", "");
    known.asked = false;
    connection("live", `Live, ${when(known.now).slice(11)}`);
  } catch (error) {
    connection("lost", error.refused ? "Key needed" : "Interrupted");
    say("problem", explained(error));
  }
  clearTimeout(poll.next);
  poll.next = setTimeout(poll, POLL_MS);
}

function explained(error) {
  if (!(error instanceof Refusal)) {
    console.error(error);
    return `This page failed: ${error.message}`;
  }
  if (error.refused) {
    if (!known.asked) showKeys(true);
    known.asked = true;
    return key(false) ? "The server does not accept this API key." : "This server wants an API key.";
  }
  if (error.status) return `The server answers with an error (${error.status}): ${error.message}. Trying again.`;
  return `The server does not answer (${error.message}). Trying again every ${POLL_MS / 1000} seconds.`;
}

async function refresh() {
  const [status, jobs] = await Promise.all([ask("mezo/status"), ask(`v1/fine_tuning/jobs?limit=${known.limit}`)]);
  known.modelName = status.served_model_name;
  $("content").hidden = false;
  showServer(status);
  await Promise.all(jobs.data.map(readCurve));
  showJobs(jobs);
  showLatency(status.serving);
  const {data} = jobs;
  const selected = data.find(job => job.id === location.hash.slice(1)) ?? data.find(job => job.status === "running") ?? data[0];
  $("job").hidden = !selected;
  if (selected) await showJob(selected);
}

// Lines of metrics.jsonl that are new. There are some while a job runs, and after that until it is seen not to.
async function readCurve(job) {
  const curve = known.curves.get(job.id) ?? {after: 0, readAs: "", byStep: new Map(), lines: []};
  known.curves.set(job.id, curve);
  while (job.status === "running" || curve.readAs !== job.status) {
    const {data, next} = await ask(`mezo/jobs/${job.id}/metrics?after=${curve.after}`);
    if (!data.length) break;
    for (const line of data) curve.byStep.set(line.step, {...curve.byStep.get(line.step), ...line});
    curve.lines = [...curve.byStep.values()].sort((a, b) => a.step - b.step);
    curve.after = next;
  }
  curve.readAs = job.status;
}

function points(job, value) {
  return known.curves.get(job.id).lines.map(line => [line.step, value(line)]).filter(([, y]) => y != null);
}

async function act(job, action) {
  if (action === "cancel" && !confirm(`Cancel ${job.id}? It cannot be resumed.`)) return;
  try {
    await ask(`v1/fine_tuning/jobs/${job.id}/${action}`, true);
    say("notice", "");
  } catch (error) {
    const reason = error.refused ? "the key that was given does not allow it" : error.message;
    say("notice", `Could not ${action} ${job.id}: ${reason}.`);
  }
  poll();
}

// --- the page ------------------------------------------------------------------------------------------------------------

// Text that does not change is not touched, so that it can be selected.
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function say(id, text) {
  $(id).hidden = !text;
  write($(id), text);
}

function connection(state, text) {
  $("connection").dataset.state = state;
  write($("connection"), text);
}

// One child of `parent` for each item, in order; a child stays the same node while its item is there.
function keep(parent, items, create, update) {
  const before = new Map([...parent.children].map(node => [node.dataset.key, node]));
  items.forEach((item, index) => {
    const node = before.get(item.id) ?? create(item);
    before.delete(item.id);
    node.dataset.key = item.id;
    update(node, item);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
  for (const node of before.values()) node.remove();
}

function facts(list, pairs) {
  const items = Object.entries(pairs).filter(([, value]) => value !== "" && value != null).map(([id, value]) => ({id, value}));
  const create = ({id}) => element("div", {}, element("dt", {}, id), element("dd"));
  keep(list, items, create, (node, {value}) => write(node.lastChild, String(value)));
}

function showServer({engine, settings, served_model_name}) {
  write($("model"), served_model_name);
  facts($("server-facts"), {
    "dtype": engine.dtype,
    "context": `${count(engine.context_length)} tokens`,
    "KV pool": `${count(engine.kv_capacity)} tokens`,
    "training beside requests": settings.share ? `${percent(settings.share)} of the time` : "in idle time only",
    "longest piece": `${settings.micro_step_ms} ms beside requests, ${settings.idle_step_ms} ms while none come`,
    "KV kept": `at most ${percent(settings.kv_share)}`,
    "largest rank": engine.max_lora_rank,
    "aLoRA": engine.no_alora ? `not served: ${engine.no_alora}` : "served",
    "after a restart": settings.on_restart === "resume" ? "jobs go on" : "jobs fail",
  });
}

function showJobs({data, has_more}) {
  $("no-jobs").hidden = data.length > 0;
  $("jobs-panel").hidden = data.length === 0;
  $("older").hidden = !has_more || known.limit >= MOST_JOBS;
  write($("how-to"), howTo());
  keep($("jobs").tBodies[0], data, createRow, updateRow);
}

function howTo() {
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${new URL("v1", ROOT)}", api_key="none or your key")`,
    'data = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")',
    `job = client.fine_tuning.jobs.create(model="${known.modelName}", training_file=data.id)`,
  ].join("\n");
}

function createRow(job) {
  const buttons = Object.keys(ACTIONS).map(action => {
    const label = action[0].toUpperCase() + action.slice(1);
    const button = element("button", {type: "button", "aria-label": `${label} ${job.id}`, "data-action": action}, label);
    button.addEventListener("click", () => act(job, action));
    return button;
  });
  const cell = (attributes, ...children) => element("td", {role: "cell", ...attributes}, ...children);
  return element("tr", {role: "row"},
    cell({}, element("a", {href: `#${job.id}`}), element("span", {class: "mono"})),
    cell({}, element("span", {class: "status"})),
    cell({}, element("span"), element("progress", {"aria-label": "Steps taken"})),
    cell({class: "number", "data-label": "loss"}),
    cell({class: "number", "data-label": "accuracy"}),
    cell({class: "number wide"}, when(job.created_at).slice(0, 16)),
    cell({class: "number wide"}),
    cell({}, ...buttons),
  );
}

function updateRow(row, job) {
  const [name, status, steps, loss, accuracy, , time, actions] = row.cells;
  const taken = points(job, line => line.step).at(-1)?.[0] ?? 0;
  const all = stepsOf(job);
  write(name.firstChild, title(job));
  write(name.lastChild, title(job) === job.id ? "" : job.id);
  showStatus(status.firstChild, job);
  write(steps.firstChild, all ? `${count(taken)} of ${count(all)}` : count(taken));
  steps.lastChild.hidden = !all;
  Object.assign(steps.lastChild, {max: all || 1, value: Math.min(taken, all)});
  write(loss, decimal(points(job, line => line.loss).at(-1)?.[1]));
  write(accuracy, percent(points(job, line => line.eval_accuracy).at(-1)?.[1]));
  write(time, elapsed((job.finished_at ?? known.now) - job.created_at));
  for (const button of actions.children) button.hidden = !ACTIONS[button.dataset.action].includes(job.status);
}

function title(job) { return job.user_provided_suffix ?? job.id; }
function hyperparameters(job) { return job.method.supervised.hyperparameters; }
function stepsOf(job) { return Number(hyperparameters(job).max_steps) || 0; }

function showStatus(node, job) {
  node.dataset.status = job.status;
  write(node, job.status.replace("_", " "));
}

async function showJob(job) {
  for (const row of $("jobs").tBodies[0].rows) row.toggleAttribute("aria-current", row.dataset.key === job.id);
  write($("job-title"), title(job));
  showStatus($("job-status"), job);
  say("job-error", job.error?.message ? `${job.error.message} (${job.error.code})` : "");
  showCurves(job);
  const [events, checkpoints, files] = await Promise.all([
    ask(`v1/fine_tuning/jobs/${job.id}/events?limit=50`), ask(`v1/fine_tuning/jobs/${job.id}/checkpoints?limit=50`), fileNames(job),
  ]);
  const left = job.estimated_finish && `about ${elapsed(job.estimated_finish - known.now)} left`;
  const answers = job.fine_tuned_model && `answers as ${job.fine_tuned_model}`;
  const labels = Object.entries(job.metadata ?? {}).map(([name, value]) => `${name}: ${value}`);
  write($("job-line"), [job.id, `base model ${job.model}`, ...files, answers, left, ...labels].filter(Boolean).join("  ·  "));
  showEvents(events.data);
  showCheckpoints(checkpoints.data);
  const {target_modules, ...others} = hyperparameters(job);
  facts($("hyperparameters"), {...others, target_modules: [target_modules].flat().join(", "), seed: job.seed});
}

async function fileNames(job) {
  const roles = [["trains on", job.training_file], ["validates on", job.validation_file]].filter(([, id]) => id);
  return Promise.all(roles.map(async ([role, id]) => {
    if (!known.files.has(id)) {
      known.files.set(id, await ask(`v1/files/${id}`).then(file => file.filename, error => {
        if (error.status !== 404) throw error;
        return `${id} (deleted)`;
      }));
    }
    return `${role} ${known.files.get(id)}`;
  }));
}

function showCurves(job) {
  const mean = values => values && values.reduce((sum, value) => sum + value, 0) / values.length;
  const both = line => line.loss_plus && mean([...line.loss_plus, ...line.loss_minus]);
  const validation = points(job, line => line.eval_loss);
  const series = [
    {name: "each step", style: "faint", points: points(job, both)},
    {name: "mean of 20", style: "first", points: points(job, line => line.loss)},
  ];
  if (validation.length) series.push({name: "validation", style: "second", points: validation, dots: true});
  const steps = points(job, line => line.step).map(([step]) => step);
  const x = [steps[0], steps.at(-1)];
  charts.loss.update({series: series.filter(({points}) => points.length), x});
  const accuracy = points(job, line => line.eval_accuracy);
  const measured = accuracy.length ? [{name: "accuracy", style: "second", points: accuracy, dots: true}] : [];
  charts.accuracy.update({series: measured, x, y: [0, 1]});
}

function showEvents(events) {
  $("no-events").hidden = events.length > 0;
  const create = ({created_at, level}) => {
    const at = when(created_at);
    return element("li", {"data-level": level}, element("time", {title: at}, at.slice(11)), element("span"));
  };
  keep($("events"), events, create, (node, {message}) => write(node.lastChild, message));
}

function showCheckpoints(checkpoints) {
  $("no-checkpoints").hidden = checkpoints.length > 0;
  $("checkpoints").hidden = checkpoints.length === 0;
  const create = () => element("tr", {}, element("td"), ...[1, 2, 3].map(() => element("td", {class: "number"})));
  keep($("checkpoints").tBodies[0], checkpoints, create, (row, {fine_tuned_model_checkpoint, step_number, metrics}) => {
    const {valid_loss, train_loss, valid_mean_token_accuracy} = metrics;
    const texts = [fine_tuned_model_checkpoint, count(step_number), decimal(valid_loss ?? train_loss), percent(valid_mean_token_accuracy)];
    texts.forEach((text, index) => write(row.cells[index], text));
  });
}

// --- serving latency -----------------------------------------------------------------------------------------------------

function showLatency(serving) {
  const spans = [];
  for (const {start, training} of serving.series) {
    if (!training) continue;
    if (spans.length && spans.at(-1)[1] === start) spans.at(-1)[1] += serving.bucket_seconds;
    else spans.push([start, start + serving.bucket_seconds]);
  }
  const from = Math.max(known.now - 1800, Math.min(serving.series[0]?.start ?? known.now, known.now - 300));
  for (const [id, field] of [["ttft", "ttft_seconds"], ["tpot", "tpot_seconds"]]) {
    const middle = bucket => bucket.start + serving.bucket_seconds / 2;
    const line = percentile => serving.series.map(bucket => [middle(bucket), bucket[field][percentile]]).filter(([, y]) => y != null);
    const series = [["p50", "first"], ["p99", "second"]].map(([name, style]) => ({name, style, points: line(name), gap: 60}));
    const highest = Math.max(0, ...series[1].points.map(([, y]) => y));
    charts[id].update({
      series: series.filter(({points}) => points.length), bands: {name: "training", spans},
      x: [from, known.now], y: [0, 1.1 * highest || 1],
    });
    showSides($(id), serving.training, serving.idle, field);
  }
}

function showSides(figure, training, idle, field) {
  const table = figure.querySelector(".sides") ?? figure.insertBefore(createSides(), figure.children[1]);
  ["p50", "p99"].forEach((name, index) => {
    const [beside, without] = [training[field][name], idle[field][name]];
    const comparable = Math.min(training.count, idle.count) >= COMPARABLE && beside && without;
    const texts = [duration(beside), duration(without), comparable ? `× ${(beside / without).toFixed(2)}` : "–"];
    texts.forEach((text, column) => write(table.tBodies[0].rows[index].cells[column + 1], text));
  });
  const requests = table.tFoot.rows[0].cells;
  [training, idle].forEach(({count: number}, column) => write(requests[column + 1], count(number)));
}

function createSides() {
  const head = ["", "training", "no training", "ratio"].map(text => element("th", {scope: "col"}, text));
  const row = name => element("tr", {}, element("th", {scope: "row"}, name), element("td"), element("td"), element("td"));
  return element("table", {class: "sides"}, element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, row("p50"), row("p99")), element("tfoot", {}, row("requests")));
}

// --- keys ----------------------------------------------------------------------------------------------------------------

function showKeys(open) {
  $("keys").hidden = !open;
  $("open-keys").setAttribute("aria-expanded", String(open));
}

$("open-keys").addEventListener("click", () => showKeys($("keys").hidden));
$("forget-keys").addEventListener("click", () => { sessionStorage.clear(); $("keys").reset(); poll(); });
$("keys").addEventListener("submit", event => {
  event.preventDefault();
  for (const id of ["api-key", "admin-key"]) {
    if ($(id).value) sessionStorage.setItem(id, $(id).value);
  }
  $("keys").reset();
  showKeys(false);
  poll();
});
$("older").addEventListener("click", () => { known.limit = Math.min(MOST_JOBS, known.limit + 20); poll(); });
addEventListener("hashchange", poll);
document.addEventListener("visibilitychange", poll);
poll();
