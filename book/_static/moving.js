/* SPDX-License-Identifier: Apache-2.0
   Copyright The NVFP4 Calibration Book authors

   What the book's moving elements share. An element is a <div class="moving" data-element="NAME"> that holds
   a static figure and its settings as JSON; window.moving.elements.NAME(live, settings, show) fills the live one
   and calls show() when it has its numbers. The figure stays for print, and where a script or the numbers are missing. */
window.moving ??= { elements: {} };
(() => {
  "use strict";
  const FOLDER = document.currentScript.src.replace(/[^/]*$/, "");
  const SVG = "http://www.w3.org/2000/svg";

  /* make("button", {type: "button", onclick: f}, "text", child ...): an element of the page. */
  function make(name, attributes = {}, ...children) {
    return fill(document.createElement(name), attributes, children);
  }

  /* The same for a drawing. */
  function draw(name, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, name), attributes, children);
  }

  function fill(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }

  /* A labelled list to pick from: select("site", ["a", "b"], "a", picked => ...). Options may be [value, text]. */
  function select(label, options, value, onpick) {
    const list = make("select", { onchange: () => onpick(list.value) });
    for (const option of options) {
      const [name, text] = Array.isArray(option) ? option : [option, option];
      list.append(make("option", { value: name, selected: name === value }, text));
    }
    return make("label", {}, make("span", {}, label), list);
  }

  /* The numbers that ``pack`` of studies/pages/interactive.py made. */
  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  /* Scripts are the one way to load numbers that also works from a file. */
  const arrivals = {}, pending = {};
  function load(name) {
    pending[name] ??= new Promise((resolve, reject) => {
      arrivals[name] = (text) => unpack(text).then(resolve, reject);
      const script = make("script", { src: `${FOLDER}curves/${encodeURIComponent(name)}` });
      script.onerror = () => { delete pending[name]; reject(new Error(`cannot load ${script.src}`)); };
      document.head.append(script);
    });
    return pending[name];
  }

  /* The address holds an element's state: #scale?site=...&at=amax. Only keys that the element has are read. */
  function readState(name, defaults) {
    const [head, query] = location.hash.slice(1).split("?");
    if (head !== name || query === undefined) return { ...defaults };
    const given = new URLSearchParams(query);
    return Object.fromEntries(Object.entries(defaults).map(([k, v]) => [k, given.get(k) ?? v]));
  }

  function writeState(name, state) {
    history.replaceState(history.state, "", `#${name}?${new URLSearchParams(state)}`);
  }

  /* Speaks the last of a burst of texts to a screen reader. */
  function speaker() {
    const node = make("p", { class: "moving-said", "aria-live": "polite" });
    let timer;
    node.say = (text) => {
      clearTimeout(timer);
      if (!node.isConnected) { node.textContent = text; return; } /* on a page that loads, it waits to be read */
      timer = setTimeout(() => { if (node.textContent !== text) node.textContent = text; }, 250);
    };
    return node;
  }

  /* 3 significant digits, as Python's "{:.3g}", without its exponents up to a million. */
  function short(value, digits = 3) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(digits)));
  }

  const signed = (value) => (value < 0 ? "-" : "+") + short(Math.abs(value), 2);
  const percent = (share) => `${short(100 * share)} %`;
  const decibels = (value) => `${value.toFixed(2).replace(/^-0\.00$/, "0.00")} dB`;

  /* Calls redraw(width) when the element's width changes. */
  function onWidth(node, redraw) {
    let last = 0;
    new ResizeObserver(() => {
      const width = Math.floor(node.clientWidth);
      if (width && width !== last) redraw((last = width));
    }).observe(node);
  }

  function start(root) {
    const name = root.dataset.element;
    const settings = JSON.parse(root.querySelector(":scope > script[type='application/json']").textContent);
    const live = make("div", { class: `moving-live moving-${name}` });
    const show = () => {
      if (!live.isConnected) root.classList.contains("moving-keep") ? root.append(live) : root.prepend(live);
      root.classList.add("moving-on");
    };
    const fail = (error) => {
      live.remove();
      root.classList.remove("moving-on");
      console.warn(`${name}: the figure stays static. ${error.message}`);
    };
    Promise.resolve(window.moving.elements[name](live, settings, show)).then(show, fail);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        watcher.unobserve(entry.target);
        start(entry.target);
      }
    }, { rootMargin: "50%" });
    for (const root of document.querySelectorAll(".moving")) {
      if (!location.hash.startsWith(`#${root.dataset.element}?`)) { watcher.observe(root); continue; }
      start(root);
      root.scrollIntoView();
    }
  });

  Object.assign(window.moving, { make, draw, select, unpack, load, readState, writeState, speaker, short, signed, percent,
    decibels, onWidth, deliver: (name, text) => arrivals[name](text) });
})();
