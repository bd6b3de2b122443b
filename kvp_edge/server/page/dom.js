// Elements are built here from text, never from markup.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element. Properties are set as such; "aria-..." and "data-..." as attributes. */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-")) element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

const PATHS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  menu: "M4 7h16M4 12h16M4 17h16",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  keyboard: "M3 7h18v10H3zM7 11h.01M11 11h.01M15 11h.01M8 14h8",
  cells: "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  done: "M5 13l5 5 9-11",
  edit: "M4 20l1-5L16 4l4 4L9 19zM13 7l4 4",
  again: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
  previous: "M14 6l-6 6 6 6",
  next: "M10 6l6 6-6 6",
  remove: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  sun: "M12 8a4 4 0 1 0 0 8a4 4 0 1 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M19 5l-1.4 1.4M6.4 17.6L5 19",
  moon: "M20 14A8 8 0 1 1 10 4a6.5 6.5 0 0 0 10 10z",
};

/** A drawing beside or instead of words; the words are the button's. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = svg.appendChild(document.createElementNS(space, "path"));
  path.setAttribute("d", PATHS[name]);
  return svg;
}

/** A button that shows only an icon. */
export function iconButton(name, label, onclick) {
  return make("button", { type: "button", className: "icon", "aria-label": label, title: label, onclick },
    icon(name));
}

/** Put icons where the page names them. */
export function drawIcons() {
  for (const place of document.querySelectorAll("[data-icon]")) {
    place.replaceChildren(icon(place.dataset.icon));
    if (place.ariaLabel) place.title = place.ariaLabel;
  }
}

/** Say something to those who hear the page. */
export function announce(text) {
  byId("status").textContent = text;
}
