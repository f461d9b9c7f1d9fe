"use strict";
// OpenAPI as a page: ready-made viewers load scripts from elsewhere, which the service forbids.

function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

function table(names, rows) {
  const head = make("tr", ...names.map((name) => make("th", name)));
  return make("table", head, ...rows.map(([key, text]) => make("tr", make("th", make("code", key)), make("th", text))));
}

function section(path, method, operation) {
  const parts = [make("h2", make("code", `${method.toUpperCase()} ${path}`)), make("p", operation.description ?? "")];
  for (const { schema } of Object.values(operation.requestBody?.content ?? {})) {
    const fields = Object.entries(schema.properties);
    parts.push(table(["part", "description"], fields.map(([name, field]) => [name, field.description ?? ""])));
    const files = "images" in schema.properties ? "-F images=@lesion.jpg " : "";
    parts.push(make("pre", `curl ${files}-F metadata='{}' ${new URL(path.slice(1), document.baseURI)}`));
  }
  parts.push(table(["status", "description"], Object.entries(operation.responses).map(([status, { description }]) => [status, description])));
  const found = make("section", ...parts);
  found.className = "card";
  return found;
}

async function start() {
  const key = sessionStorage.getItem("dualrefnet-api-key");
  const response = await fetch("openapi.json", { headers: key ? { "X-API-Key": key } : {} });
  const main = document.getElementById("main");
  if (!response.ok) {
    main.append(make("p", response.status === 401 ? "Sign in on the page first." : `The description is not available (${response.status}).`));
    return;
  }
  const openapi = await response.json();
  main.firstElementChild.textContent = openapi.info.title;
  main.append(make("p", openapi.info.description));
  for (const [path, operations] of Object.entries(openapi.paths)) {
    for (const [method, operation] of Object.entries(operations)) main.append(section(path, method, operation));
  }
}

start();
