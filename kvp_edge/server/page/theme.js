"use strict";
// Not a module: it runs before the page is painted, so that it never flashes in the other theme.
try {
  document.documentElement.dataset.theme = localStorage.getItem("kvp-theme") ?? "";
} catch {
  // the browser may remember nothing
}
