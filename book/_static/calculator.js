/* SPDX-License-Identifier: Apache-2.0
   Copyright The NVFP4 Calibration Book authors

   The element "calculator": scales from three numbers of a tensor's nonzero block amaxes, and the room they leave. */
window.moving ??= { elements: {} };
(() => {
  "use strict";
  const AMAX_PER_SCALE = 2688, NORMAL_RANGE = 28672, RHO = 16384;
  const NAMES = { p1: "p1", p9999: "p99.99", amax: "amax" };

  /* What is wrong with the numbers, or "". */
  function problem({ p1, p9999, amax }) {
    for (const [key, value] of Object.entries({ p1, p9999, amax }))
      if (!(value > 0 && Number.isFinite(value))) return `${NAMES[key]} has to be a positive number; zero blocks are left out.`;
    if (p1 > p9999 || p9999 > amax) return "Expected p1 ≤ p99.99 ≤ amax: all three are of the same block amaxes.";
    return "";
  }

  /* As studies.pages.index.calculator: a row per choice, rooms in octaves, and a verdict. */
  function calculate({ p1, p9999, amax }) {
    const room = Math.log2((NORMAL_RANGE * p1) / amax);
    const amaxes = { "amax": amax, "middle of the room": amax * 2 ** (Math.max(room, 0) / 2), "headroom": Math.fround(Math.max(RHO * p1, p9999)) };
    const rows = Object.entries(amaxes).map(([name, calibrated]) => {
      const scale = Math.fround(calibrated / AMAX_PER_SCALE);
      return { name, calibrated, scale, reciprocal: 1 / scale, above: Math.log2(calibrated / amax), below: Math.log2((NORMAL_RANGE * p1) / calibrated) };
    });
    const octaves = Math.abs(room).toFixed(1);
    const verdict = room <= 0
      ? `No room: the blocks span ${octaves} octaves more than E4M3's normal range. Take the amax; headroom ` +
        (amaxes.headroom < amax ? "would clip." : "pushes small blocks into the subnormals.")
      : `Room of ${octaves} octaves: no scale between the amax's and one ${octaves} octaves above it clips what was seen or makes more than 1 % of ` +
        "its blocks subnormal. Take the middle" + (amaxes.headroom < amax ? "; headroom would clip." : ".");
    return { room, rows, verdict };
  }

  window.moving.elements.calculator = async (root, settings, show) => {
    const { make, select, readState, writeState, speaker, short } = window.moving;
    const state = readState("calculator", Object.fromEntries(Object.keys(NAMES).map((key) => [key, String(settings[key])])));
    const inputs = Object.fromEntries(Object.entries(NAMES).map(([key, label]) => {
      const input = make("input", { type: "text", inputmode: "decimal", value: state[key], spellcheck: "false", oninput: () => go(), onpaste: paste });
      return [key, { input, label: make("label", {}, make("span", {}, label), input) }];
    }));
    const file = make("input", { type: "file", accept: ".json,application/json", onchange: () => file.files[0]?.text().then(report) });
    const sites = make("span");
    const table = make("div", { class: "moving-scroll" });
    const verdict = speaker();
    root.append(make("p", { class: "moving-caption" }, "Of the nonzero block amaxes of one tensor, in its own units: first percentile, percentile " +
      "99.99, largest. Three numbers pasted at once fill all fields. Nothing leaves this page."),
      make("div", { class: "moving-controls" }, ...Object.values(inputs).map((i) => i.label), make("label", {}, make("span", {}, "or a report.json"), file), sites),
      table, verdict);

    function paste(event) {
      const numbers = event.clipboardData.getData("text").match(/[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/gi) ?? [];
      if (numbers.length !== 3) return;
      event.preventDefault();
      fill(...numbers);
    }

    function fill(...numbers) {
      Object.values(inputs).forEach(({ input }, i) => { input.value = numbers[i]; });
      go();
    }

    /* A report of this book's tools: sites, each with block_amax p1, p99.99 and amax, or null where all is zero. */
    function report(text) {
      let known;
      try {
        known = Object.entries(JSON.parse(text).sites).filter(([, site]) => site.block_amax);
      } catch {
        known = [];
      }
      if (!known.length) {
        sites.replaceChildren();
        verdict.say("This file holds no sites with block_amax: p1, p99.99, amax; expected a report.json.");
        return;
      }
      const pick = (name) => { const b = Object.fromEntries(known)[name].block_amax; fill(b.p1, b["p99.99"], b.amax); };
      sites.replaceChildren(select("site", known.map(([name]) => name), known[0][0], pick));
      pick(known[0][0]);
    }

    function go() {
      for (const key of Object.keys(NAMES)) state[key] = inputs[key].input.value.trim();
      writeState("calculator", state);
      update();
    }

    function update() {
      const numbers = Object.fromEntries(Object.keys(NAMES).map((key) => [key, state[key] === "" ? NaN : Number(state[key])]));
      const wrong = problem(numbers);
      if (wrong) {
        table.replaceChildren();
        verdict.say(wrong);
        return;
      }
      const found = calculate(numbers);
      const rows = {
        "calibrated amax": (r) => short(r.calibrated, 5),
        "input_scale": (r) => short(r.scale, 6),
        "1 / input_scale": (r) => short(r.reciprocal, 6),
        "octaves above the largest block": (r) => r.above.toFixed(1),
        "octaves until p1 is subnormal": (r) => r.below.toFixed(1),
      };
      table.replaceChildren(make("table", { "aria-label": "Scales and their room" },
        make("thead", {}, make("tr", {}, make("td"), ...found.rows.map((r) => make("th", { scope: "col" }, r.name)))),
        make("tbody", {}, ...Object.entries(rows).map(([label, cell]) =>
          make("tr", {}, make("th", { scope: "row" }, label), ...found.rows.map((r) => make("td", {}, cell(r))))))));
      verdict.say(found.verdict);
    }

    window.addEventListener("hashchange", () => {
      Object.assign(state, readState("calculator", state));
      for (const key of Object.keys(NAMES)) inputs[key].input.value = state[key];
      update();
    });
    update();
    show();
  };

  window.moving.calculate = calculate;
})();
