"use strict";
// Not a module: it runs before the page is painted, so that it never flashes in the other theme.
document.documentElement.dataset.theme = localStorage.getItem("kvp-theme") ?? "";
