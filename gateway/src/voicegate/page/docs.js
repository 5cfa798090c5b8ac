"use strict";
// /openapi.json as a page to read.
function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

function kind(schema) {
  if (schema.enum) return schema.enum.join(" | ");
  return [schema.type ?? "any"].flat().join(" | ") + (schema.format ? ` (${schema.format})` : "");
}

function describe(path, method, operation) {
  const section = make("section", "", make("h2", `${method.toUpperCase()} ${path}`), make("p", operation.summary));
  section.className = "card";
  const form = operation.requestBody?.content?.["multipart/form-data"]?.schema;
  const fields = [
    ...(operation.parameters ?? []).map((item) => [item.name, item.schema, item.description, item.required]),
    ...Object.entries(form?.properties ?? {}).map(([name, schema]) =>
      [name, schema, schema.description, form.required?.includes(name)]),
  ];
  if (fields.length) {
    const table = make("table", "", make("tr", "", make("th", "Field"), make("th", "Kind"), make("th", "Meaning")));
    for (const [name, schema, description, required] of fields) {
      const meaning = [required ? "Required." : "", description ?? ""].filter(Boolean).join(" ");
      table.append(make("tr", "", make("td", name), make("td", kind(schema ?? {})), make("td", meaning)));
    }
    section.append(table);
  }
  for (const [status, answer] of Object.entries(operation.responses ?? {})) {
    const kinds = Object.keys(answer.content ?? {}).join(", ");
    section.append(make("p", `${status}: ${answer.description}${kinds ? ` (${kinds})` : ""}`));
  }
  return section;
}

(async () => {
  const routes = document.getElementById("routes");
  const answer = await fetch("/openapi.json");
  const schema = await answer.json();
  routes.replaceChildren();
  for (const [path, methods] of Object.entries(schema.paths))
    for (const [method, operation] of Object.entries(methods)) routes.append(describe(path, method, operation));
  const shapes = make("details", "", make("summary", "Shapes of the answers"));
  for (const [name, shape] of Object.entries(schema.components.schemas))
    shapes.append(make("h2", name), make("pre", JSON.stringify(shape, null, 1)));
  routes.append(shapes);
})();
