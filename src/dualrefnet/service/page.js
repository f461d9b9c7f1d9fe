"use strict";
// The page of one lesion, over /v1/*. Everything from the server or a file is set as text, never as markup.

const FIRST = 8;
const KEY = "dualrefnet-api-key";
const state = { model: null, files: [], key: sessionStorage.getItem(KEY), request: null, submitted: null };
const $ = (id) => document.getElementById(id);

/** Make an element: properties, then children (elements or texts). */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "for" || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const words = (name) => {
  const text = name.replaceAll("_", " ");
  return sentence(text === text.toUpperCase() ? text.toLowerCase() : text);
};
const className = (label) => state.model.class_names[label] ?? label;
const points = (change) => `${change < 0 ? "−" : "+"}${Math.abs(100 * change).toFixed(1)}`;
function percent(probability) {
  if (probability < 0.01) return "< 1%";
  return probability > 0.99 ? "> 99%" : `${Math.round(100 * probability)}%`;
}

/** Ask the API; throws an Error whose message can be shown. */
async function api(path, options = {}) {
  const headers = state.key ? { "X-API-Key": state.key } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service can't be reached. Check the connection and try again.");
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  const failure = new Error(sentence(body?.error?.message ?? `the service responded with status ${response.status}`));
  failure.status = response.status;
  throw failure;
}

async function start() {
  const entered = Boolean(state.key);
  try {
    state.model = await api("v1/model");
  } catch (error) {
    if (error.status === 401) {
      state.key = null;
      sessionStorage.removeItem(KEY);
      $("login").hidden = false;
      $("columns").hidden = true;
      $("login-error").textContent = entered ? "That key was not accepted." : "";
      $("key").focus();
    } else {
      $("columns").hidden = false;
      $("form").hidden = true;
      $("error").textContent = error.message;
    }
    return;
  }
  if (state.key) sessionStorage.setItem(KEY, state.key);
  $("login").hidden = true;
  $("columns").hidden = false;
  showModel();
}

function showModel() {
  const { model } = state;
  $("about").textContent = `${model.classes.length} classes, trained on ${model.title} (${model.name}).`;
  if (model.warning) {
    $("shortcut").hidden = false;
    $("shortcut").textContent = `Do not use it where metadata may be missing. ${sentence(model.warning)}.`;
  }
  $("image-card").hidden = !model.reads_image;
  const most = model.limits.images;
  $("images-hint").textContent =
    `${model.needs_image ? "" : "Optional. "}Up to ${most} images of one lesion, pooled into one prediction.`;
  const measured = model.fields.some((field) => field.effect !== null);
  $("metadata-hint").textContent =
    `${measured ? "The fields that change the prediction most come first. " : ""}Leave empty what isn't known.`;
  $("metadata-card").hidden = !model.fields.length;
  const fields = [...model.fields].sort((one, other) => (other.effect ?? 0) - (one.effect ?? 0));
  $("first-fields").replaceChildren(...fields.slice(0, FIRST).map(makeField));
  $("more-fields").replaceChildren(...fields.slice(FIRST).map(makeField));
  $("more").hidden = fields.length <= FIRST;
  $("more").firstElementChild.textContent = `${fields.length - FIRST} more fields`;
}

function makeField(field) {
  const id = `field-${field.name}`;
  const text = (field.description || words(field.name)) + (field.unit ? ` (${field.unit})` : "");
  let input;
  if (field.kind === "numeric") {
    // A text field: one of numbers would drop "6,5" without a word.
    input = make("input", { id, name: field.name, inputMode: "decimal", autocomplete: "off", placeholder: "unknown" });
  } else {
    const values = field.kind === "boolean" ? [["true", "yes"], ["false", "no"]] : field.levels.map((level) => [level, words(level)]);
    const options = [["", "unknown"], ...values].map(([value, label]) => make("option", { value }, label));
    input = make("select", { id, name: field.name }, ...options);
  }
  return make("div", { className: "field" }, make("label", { for: id }, text), input);
}

/** Return the metadata that are filled in; throws on a number that can't be read or is out of range. */
function readMetadata() {
  const metadata = {};
  let problem = null;
  for (const field of state.model.fields) {
    const input = $(`field-${field.name}`);
    const text = input.value.trim();
    input.removeAttribute("aria-invalid");
    if (!text) continue;
    if (field.kind === "boolean") metadata[field.name] = text === "true";
    else if (field.kind === "categorical") metadata[field.name] = text;
    else {
      const number = Number(text.replace(",", "."));
      const low = field.minimum ?? -Infinity;
      const high = field.maximum ?? Infinity;
      if (Number.isFinite(number) && number >= low && number <= high) metadata[field.name] = number;
      else {
        input.setAttribute("aria-invalid", "true");
        problem ??= [input, `${input.labels[0].textContent}: enter a number${range(field)}.`];
      }
    }
  }
  if (!problem) return metadata;
  if ($("more").contains(problem[0])) $("more").open = true;
  problem[0].focus();
  throw new Error(problem[1]);
}

function range({ minimum, maximum }) {
  if (minimum !== null && maximum !== null) return ` from ${minimum} to ${maximum}`;
  if (minimum !== null) return ` of at least ${minimum}`;
  return maximum !== null ? ` of at most ${maximum}` : "";
}

function addFiles(event) {
  const most = state.model.limits.images;
  state.files.push(...event.target.files);
  event.target.value = "";
  $("error").textContent = state.files.length > most ? `Only the first ${most} images are kept.` : "";
  state.files.length = Math.min(state.files.length, most);
  showPreviews();
  markStale();
}

function showPreviews() {
  for (const image of $("previews").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("previews").replaceChildren(...state.files.map((file, index) => {
    const image = make("img", { src: URL.createObjectURL(file), alt: `Image ${index + 1}: ${file.name}` });
    const remove = make("button", { type: "button", "aria-label": `Remove image ${index + 1}` }, "Remove");
    remove.addEventListener("click", () => {
      state.files.splice(index, 1);
      showPreviews();
      markStale();
      $("files").focus();
    });
    return make("li", {}, image, remove);
  }));
}

function markStale() {
  for (const id of ["result", "explanation"]) $(id).classList.toggle("stale", !$(id).hidden);
}

function clearOutput() {
  state.request?.abort();
  state.request = null;
  $("error").textContent = $("status").textContent = "";
  for (const id of ["result", "explanation"]) {
    $(id).hidden = true;
    $(id).classList.remove("stale");
    $(id).replaceChildren();
  }
}

/** Send the input; a newer request or a reset cancels it, and then nothing is shown. */
async function send(path, { files, metadata, label }, button, message) {
  const body = new FormData();
  for (const file of files) body.append("images", file, "image");
  body.append("metadata", JSON.stringify(metadata));
  if (label) body.append("label", label);
  state.request?.abort();
  const request = (state.request = new AbortController());
  const idle = button.textContent;
  button.disabled = true;
  button.textContent = message;
  $("output").setAttribute("aria-busy", "true");
  $("status").textContent = message;
  $("error").textContent = "";
  try {
    return await api(path, { method: "POST", body, signal: request.signal });
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
    return null;
  } finally {
    button.disabled = false;
    button.textContent = idle;
    if (state.request === request) {
      $("output").removeAttribute("aria-busy");
      $("status").textContent = "";
    }
  }
}

function showError(error) {
  if (error.status === 401) {
    start();
    return;
  }
  $("error").textContent = error.message;
  $("error").scrollIntoView({ block: "nearest" });
}

async function classify(event) {
  event.preventDefault();
  clearOutput();
  let metadata;
  try {
    metadata = readMetadata();
    if (state.model.needs_image && !state.files.length) throw new Error("Choose at least one image of the lesion.");
  } catch (error) {
    showError(error);
    return;
  }
  const input = { files: [...state.files], metadata };
  const prediction = await send("v1/predict", input, $("submit"), "Classifying…");
  if (prediction) showResult(prediction, input);
}

function showResult(prediction, input) {
  const { model } = state;
  const unlike = prediction.out_of_scope !== null && prediction.out_of_scope > 1;
  const labels = Object.keys(prediction.probabilities).sort((a, b) => prediction.probabilities[b] - prediction.probabilities[a]);
  const children = [make("h2", {}, "Result")];
  if (unlike) {
    const text = "The image is unlike those the model was trained on. Do not rely on this prediction.";
    children.push(make("div", { className: "alarm" }, make("strong", {}, "Out of distribution. "), text));
  }
  const pooled = prediction.images > 1 ? `, pooled over ${prediction.images} images` : "";
  children.push(
    make("p", { className: "prediction" }, sentence(className(prediction.label))),
    make("p", {}, `Predicted class, probability ${percent(prediction.probabilities[prediction.label])}${pooled}.`),
  );
  if (prediction.likely.length) {
    children.push(make("p", {}, make("strong", {}, "Prediction set: "), prediction.likely.map(className).join(", "), "."));
  }
  if (prediction.malignancy !== null) {
    const advice = { true: "Referral advised.", false: "Below the referral threshold." }[prediction.refer] ?? "";
    children.push(make("p", { className: prediction.refer ? "advice refer" : "advice" },
      `Probability of malignancy ${percent(prediction.malignancy)}. ${advice}`));
  }
  if (prediction.availability) {
    children.push(make("p", { className: "small" }, `Calibrated for inputs with: ${prediction.availability}.`));
  }
  children.push(makeBars("Probability of each class", labels.map((label) => ({
    name: sentence(className(label)),
    tag: model.malignant.includes(label) ? "malignant" : null,
    value: prediction.probabilities[label],
    text: percent(prediction.probabilities[label]),
  }))));
  if (prediction.warnings.length) {
    const items = prediction.warnings.map((warning) => make("li", {}, sentence(warning)));
    children.push(make("h3", {}, "Warnings"), make("ul", {}, ...items));
  }
  const select = make("select", { id: "explain-label" },
    ...labels.map((label) => make("option", { value: label }, sentence(className(label)))));
  const button = make("button", { type: "button" }, "Explain");
  button.addEventListener("click", () => explain(input, select.value, button));
  children.push(
    make("label", { for: "explain-label" }, "Explain the probability of"),
    make("div", { className: "buttons" }, select, button),
    make("p", { className: "small" }, prediction.notice),
  );
  reveal($("result"), children);
  $("result").classList.toggle("unreliable", unlike);
}

async function explain(input, label, button) {
  const body = await send("v1/explain", { ...input, files: input.files.slice(0, 1), label }, button, "Explaining…");
  if (!body) return;
  const { explanation } = body;
  const name = className(explanation.label);
  const children = [make("h2", {}, `Explanation: ${name}`)];
  if (explanation.heat) {
    const first = input.files.length > 1 ? " of the first image" : "";
    const most = (100 * explanation.heat.maximum).toFixed(1);
    const text = explanation.heat.maximum > 0
      ? `Bright regions${first} matter most: occluding the brightest lowers the probability by ${most} percentage points.`
      : `Occluding no region${first} lowers the probability.`;
    children.push(make("h3", {}, "Image: occlusion saliency"), make("p", {}, text));
    try {
      children.push(...await drawSaliency(input.files[0], explanation.heat, name));
    } catch {
      children.push(make("p", { className: "small" }, "This browser can't display the image."));
    }
  }
  const fields = explanation.fields.sort((one, other) => Math.abs(other.change) - Math.abs(one.change));
  children.push(make("h3", {}, "Metadata: change against a missing field"));
  if (fields.length) {
    children.push(makeBars("Percentage points", fields.map(({ name: field, change }) => ({
      name: $(`field-${field}`)?.labels[0].textContent ?? field, tag: null, value: change, text: points(change),
    }))));
  } else {
    children.push(make("p", {}, "No metadata were given."));
  }
  children.push(make("p", { className: "small" }, "It shows what the model reacts to, not that the prediction is right."));
  reveal($("explanation"), children);
}

function reveal(section, children) {
  section.replaceChildren(...children);
  section.hidden = false;
  section.classList.remove("stale");
  section.focus({ preventScroll: true });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  section.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
}

function makeBars(caption, rows) {
  const most = Math.max(...rows.map((row) => Math.abs(row.value)), 1e-9);
  const scale = rows.every((row) => row.value >= 0) ? Math.max(most, 1) : most;
  return make("table", {}, make("caption", {}, caption), make("tbody", {}, ...rows.map((row) => {
    const bar = make("div", { className: row.value < 0 ? "negative" : "" });
    bar.style.width = `${(100 * Math.abs(row.value)) / scale}%`;
    const tag = row.tag ? make("span", { className: "tag" }, row.tag) : null;
    const head = make("th", { scope: "row" }, row.name, tag, make("div", { className: "bar", "aria-hidden": "true" }, bar));
    return make("tr", {}, head, make("td", {}, row.text));
  })));
}

// Inferno, as in the reports: its lightness rises with the value, so that it reads in grey too.
const COLOURS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
function colour(share) {
  const place = Math.min(share, 0.9999) * (COLOURS.length - 1);
  const index = Math.floor(place);
  return COLOURS[index].map((low, channel) => low + (place - index) * (COLOURS[index + 1][channel] - low));
}

/** Lay the saliency over the image, squashed to a square as the model sees it; where it is low the skin shows through. */
async function drawSaliency(file, heat, name) {
  const side = 480;
  const canvas = make("canvas", { width: side, height: side, role: "img", "aria-label": `Occlusion saliency for ${name} over the image` });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const mask = make("img", { src: `data:image/png;base64,${heat.png}` });
  await mask.decode();
  context.drawImage(mask, 0, 0, side, side);
  const share = context.getImageData(0, 0, side, side).data;
  const image = await createImageBitmap(file, { imageOrientation: "from-image" });
  context.drawImage(image, 0, 0, side, side);
  image.close();
  const pixels = context.getImageData(0, 0, side, side);
  for (let start = 0; start < pixels.data.length; start += 4) {
    const value = share[start] / 255;
    const cover = 0.65 * Math.min(value / 0.5, 1);
    colour(value).forEach((level, channel) => {
      pixels.data[start + channel] = (1 - cover) * pixels.data[start + channel] + cover * level;
    });
  }
  context.putImageData(pixels, 0, 0);
  const scale = make("canvas", { width: 256, height: 1, className: "scale", "aria-hidden": "true" });
  const brush = scale.getContext("2d");
  for (let x = 0; x < 256; x += 1) {
    brush.fillStyle = `rgb(${colour(x / 255).join(" ")})`;
    brush.fillRect(x, 0, 1, 1);
  }
  const ends = [make("span", {}, "0"), make("span", {}, `${(100 * heat.maximum).toFixed(1)} points`)];
  return [canvas, scale, make("div", { className: "scale-ends small" }, ...ends)];
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  $("key").value = "";
  start();
});
$("files").addEventListener("change", addFiles);
$("camera").addEventListener("change", addFiles);
$("form").addEventListener("input", (event) => event.target.type !== "file" && markStale());
$("form").addEventListener("submit", classify);
$("form").addEventListener("reset", () => {
  state.files = [];
  showPreviews();
  clearOutput();
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
});
start();
