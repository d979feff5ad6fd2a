/* SPDX-License-Identifier: Apache-2.0
   Copyright The NVFP4 Calibration Book authors

   The element "cross": a heat map of calibration against test text whose cells open into their sites. */
window.moving ??= { elements: {} };
(() => {
  "use strict";

  window.moving.elements.cross = async (root, settings, show) => {
    const { make, unpack, readState, writeState, speaker } = window.moving;
    const { cells } = await unpack(settings.data);
    const { mixes, sites, unit } = settings;
    const worst = cells.map(([loss]) => Math.max(...loss));
    const start = worst.indexOf(Math.max(...worst));
    const state = readState("cross", { calibration: mixes[Math.floor(start / mixes.length)], test: mixes[start % mixes.length] });
    const map = make("div", { class: "moving-scroll moving-cross" });
    const list = make("div", { class: "moving-scroll moving-list", tabindex: 0, role: "region", "aria-label": "Sites of the picked cell" });
    const said = speaker();
    const db = (units, digits) => (units * unit).toFixed(digits);
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

    const buttons = cells.map(([loss], k) => make("button", {
      type: "button", style: `background:${settings.colors[k][0]};color:${settings.colors[k][1]}`,
      onclick: () => pick(k), onkeydown: (event) => step(event, k),
      "aria-label": `calibrated on ${mixes[Math.floor(k / mixes.length)]}, tested on ${mixes[k % mixes.length]}: mean loss ${db(mean(loss), 3)} dB, worst site ${db(worst[k], 2)} dB`,
    }, `${db(mean(loss), 3)}\n(${db(worst[k], 2)})`));

    /* Arrow keys move as on the map, Home and End along a row. */
    function step(event, k) {
      const n = mixes.length, row = Math.floor(k / n), column = k % n;
      const to = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        Home: [row, 0], End: [row, n - 1] }[event.key];
      if (!to) return;
      event.preventDefault();
      if (to.every((i) => i >= 0 && i < n)) { pick(to[0] * n + to[1]); buttons[to[0] * n + to[1]].focus(); }
    }

    const picked = () => Math.max(mixes.indexOf(state.calibration), 0) * mixes.length + Math.max(mixes.indexOf(state.test), 0);

    function pick(k) {
      Object.assign(state, { calibration: mixes[Math.floor(k / mixes.length)], test: mixes[k % mixes.length] });
      writeState("cross", state);
      open();
    }

    function open() {
      const k = picked(), [loss, low, high] = cells[k];
      buttons.forEach((button, i) => { button.setAttribute("aria-pressed", String(i === k)); button.tabIndex = i === k ? 0 : -1; });
      const order = sites.map((_, i) => i).sort((a, b) => loss[b] - loss[a]);
      const place = (site) => `explore.html#scale?${new URLSearchParams({ model: settings.run, site, calibration: state.calibration,
        test: state.test, underflow: settings.underflow, at: settings.policy })}`;
      list.replaceChildren(make("table", { "aria-label": "Loss of every site, the largest first" },
        make("thead", {}, make("tr", {}, ...["site", "loss (dB)", "95 % interval"].map((h) => make("th", { scope: "col" }, h)))),
        make("tbody", {}, ...order.map((i) => make("tr", {}, make("th", { scope: "row" }, make("a", { href: place(sites[i]) }, sites[i])),
          make("td", {}, db(loss[i], 3)), make("td", {}, `${db(low[i], 3)} to ${db(high[i], 3)}`))))));
      said.say(`Calibrated on ${state.calibration}, tested on ${state.test}: the ${sites.length} sites lose ${db(mean(loss), 3)} dB on average, ` +
        `${sites[order[0]]} the most, ${db(loss[order[0]], 2)} dB. A site leads to its curve.`);
    }

    map.append(make("table", { "aria-label": "Mean loss (dB), in brackets the worst site's" },
      make("thead", {}, make("tr", {}, make("th", {}, "calibrated on \\ tested on"), ...mixes.map((mix) => make("th", { scope: "col" }, mix)))),
      make("tbody", {}, ...mixes.map((mix, row) => make("tr", {}, make("th", { scope: "row" }, mix),
        ...mixes.map((_, column) => make("td", {}, buttons[row * mixes.length + column])))))));
    root.append(map, said, list);
    window.addEventListener("hashchange", () => { Object.assign(state, readState("cross", state)); open(); });
    open();
    show();
  };
})();
