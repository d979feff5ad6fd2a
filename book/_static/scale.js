/* SPDX-License-Identifier: Apache-2.0
   Copyright The NVFP4 Calibration Book authors

   The element "scale": one site's error over all scales, exact at every eighth of an octave and wherever a policy
   lands. Numbers: studies/pages/interactive.py, test_numbers. */
window.moving ??= { elements: {} };
(() => {
  "use strict";
  const PER_OCTAVE = 8;
  const AMAX_PER_SCALE = 2688;
  const CONVENTIONS = [["flush", "flush (kernels)"], ["floor", "floor (reference)"]];
  const HEIGHT = { plot: 240, shares: 70, axis: 40, top: 22 };
  const LEFT = 46, RIGHT = 16;

  /* The numbers of one site, as plain values: curve and policies at a convention, in decibels. */
  function site(data, settings, state) {
    const one = data.sites[state.site], floor = state.underflow === "floor";
    const snr = one.flush.map((v, i) => settings.unit * (v + (floor ? one.gain[i] : 0)));
    const amaxes = snr.map((_, i) => one.amax * 2 ** ((settings.steps[0] + i) / PER_OCTAVE));
    const shares = (of, i) => ({ saturated: of.saturated[i], subnormal: of.subnormal[i], underflow: of.underflow[i] });
    const known = one.yardstick[state.underflow] ?? [[], []];
    const point = (amax, db, of, i) => ({ amax, snr: db, scale: Math.fround(amax / AMAX_PER_SCALE), shares: shares(of, i) });
    const landed = { ...one.policies[state.calibration], ...one.policies.test };
    const policies = Object.entries(landed).map(([name, by]) => {
      const [place, units] = by[floor ? 1 : 0];
      return { name, ...point(one.at.amax[place], settings.unit * units, one.at, place) };
    });
    const best = policies.find((p) => p.name === "oracle").snr;
    return {
      amax: one.amax, best, policies,
      curve: amaxes.map((a, i) => point(a, snr[i], one, i)),
      yardstick: known[0].map((amax, i) => ({ amax, loss: settings.unit * known[1][i] })),
    };
  }

  /* The larger of the losses of SNR and block SNR: at this scale where it is stored, else at its stored neighbours. */
  function yardstick(numbers, amax) {
    const { signed, decibels } = window.moving;
    if (!numbers.yardstick.length) return "not stored for this text";
    const off = (k) => Math.log2(k.amax / amax);
    const here = numbers.yardstick.find((k) => Math.abs(off(k)) < 1e-6);
    if (here) return decibels(here.loss);
    const below = numbers.yardstick.findLast((k) => off(k) < 0), above = numbers.yardstick.find((k) => off(k) > 0);
    const near = [below, above].filter(Boolean);
    return near.map((k) => `${decibels(k.loss)} at ${signed(off(k))}`).join(", ") + " octaves";
  }

  window.moving.elements.scale = async (root, settings, show) => {
    const { make, draw, select, load, readState, writeState, speaker, short, signed, percent, decibels, onWidth } = window.moving;
    const state = readState("scale", settings.state);
    const controls = make("div", { class: "moving-controls" });
    const plot = make("div", { class: "moving-plot" });
    const slider = make("input", { type: "range", min: settings.steps[0], max: settings.steps[1], step: 1 });
    const readout = make("dl", { class: "moving-readout" });
    const table = make("div", { class: "moving-scroll" });
    const said = speaker();
    const caption = make("p", { class: "moving-caption" }, "Where every policy lands; press one to go there. Octaves: from the test " +
      "text's amax. Loss: from its best scale, the oracle's. Yardstick: the larger of the losses of SNR and of SNR by block, known at " +
      "stored scales. Shares: of the nonzero blocks. Marks at an edge of the plot lie beyond it.");
    let numbers, width = 0, at;
    root.append(controls, plot,
      make("label", { class: "moving-slider" }, make("span", {}, "log2 of input_scale"), slider), readout, said, caption, table);

    const model = () => settings.models.find((m) => m.name === state.model);

    function repair() {
      if (!model()) Object.assign(state, settings.state);
      const { mixes, sites } = model();
      if (!sites.includes(state.site)) state.site = sites[0];
      for (const pool of ["calibration", "test"]) if (!mixes.includes(state[pool])) state[pool] = mixes[0];
      if (!CONVENTIONS.some(([name]) => name === state.underflow)) state.underflow = "flush";
    }

    /* ``at`` of the state: a policy, or octaves from the test text's amax. */
    function place() {
      const policy = numbers.policies.find((p) => p.name === state.at);
      if (policy) return policy;
      const octaves = Number(state.at);
      const step = Math.round((Number.isFinite(octaves) ? octaves : 0) * PER_OCTAVE) - settings.steps[0];
      return numbers.curve[Math.min(Math.max(step, 0), numbers.curve.length - 1)];
    }

    async function refresh() {
      repair();
      const wanted = `${state.model}.${state.test}.js`;
      const data = await load(wanted);
      if (wanted !== `${state.model}.${state.test}.js`) return;
      numbers = site(data, settings, state);
      pickers();
      move();
    }

    function pick(key) {
      return (value) => {
        state[key] = value;
        refresh().then(() => writeState("scale", state));
      };
    }

    function pickers() {
      const { mixes, sites } = model();
      const focus = [...controls.querySelectorAll("select")].indexOf(document.activeElement);
      controls.replaceChildren(
        select("model", settings.models.map((m) => [m.name, m.label]), state.model, pick("model")),
        select("site", sites, state.site, pick("site")),
        select("calibrated on", mixes, state.calibration, pick("calibration")),
        select("tested on", mixes, state.test, pick("test")),
        select("block scales below E4M3", CONVENTIONS, state.underflow, pick("underflow")));
      if (focus >= 0) controls.querySelectorAll("select")[focus].focus();
    }

    function go(target) {
      state.at = String(target);
      writeState("scale", state);
      move();
    }

    function move() {
      at = place();
      const octaves = Math.log2(at.amax / numbers.amax);
      slider.value = Math.round(octaves * PER_OCTAVE);
      const rows = {
        "input_scale": short(at.scale, 4),
        "log2 of it": Math.log2(at.scale).toFixed(3),
        "calibrated amax": short(at.amax, 4),
        "over the test text's amax": `${signed(octaves)} octaves`,
        "SNR": decibels(at.snr),
        "loss from the best": decibels(numbers.best - at.snr),
        "yardstick": yardstick(numbers, at.amax),
        "saturated": percent(at.shares.saturated),
        "subnormal": percent(at.shares.subnormal),
        [state.underflow === "flush" ? "flushed" : "floored"]: percent(at.shares.underflow),
      };
      readout.replaceChildren(...Object.entries(rows).map(([k, v]) =>
        make("div", { "data-name": k }, make("dt", {}, k), make("dd", {}, v))));
      const words = `input_scale ${rows.input_scale}, SNR ${rows.SNR}, ${rows["loss from the best"]} below the best; ` +
        `${rows.saturated} of the blocks saturated, ${rows.subnormal} subnormal, ${percent(at.shares.underflow)} below E4M3`;
      slider.setAttribute("aria-valuetext", words);
      said.say(`${at.name ? settings.marks[at.name].label + ": " : ""}${words}.`);
      policyTable();
      if (width) drawPlot();
    }

    function policyTable() {
      const focus = document.activeElement?.dataset?.policy;
      const rows = numbers.policies.map((p) => {
        const mark = settings.marks[p.name];
        const button = make("button", { type: "button", "data-policy": p.name, "aria-pressed": String(at.name === p.name),
          onclick: () => go(p.name) },
          draw("svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" },
            draw("path", { d: mark.path, transform: "scale(5)", fill: mark.color })), mark.label);
        const known = numbers.yardstick.find((k) => Math.abs(Math.log2(k.amax / p.amax)) < 1e-6);
        return make("tr", {}, make("th", { scope: "row" }, button), ...[p.snr.toFixed(2),
          decibels(numbers.best - p.snr).slice(0, -3), known ? known.loss.toFixed(2) : "–", short(p.scale, 4),
          signed(Math.log2(p.amax / numbers.amax))].map((cell) => make("td", {}, cell)));
      });
      const heads = ["policy", "SNR (dB)", "loss (dB)", "yardstick (dB)", "input_scale", "octaves"];
      table.replaceChildren(make("table", { "aria-label": "Where every policy lands" },
        make("thead", {}, make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, h)))), make("tbody", {}, ...rows)));
      if (focus) table.querySelector(`[data-policy="${focus}"]`)?.focus();
    }

    /* Scales outside the drawn octaves are drawn at the edge. */
    const octaveOf = (amax) => Math.min(Math.max(Math.log2(amax / numbers.amax), settings.steps[0] / PER_OCTAVE), settings.steps[1] / PER_OCTAVE);
    const first = settings.steps[0] / PER_OCTAVE, last = settings.steps[1] / PER_OCTAVE;
    const x = (octaves) => LEFT + ((octaves - first) / (last - first)) * (width - LEFT - RIGHT);

    function drawPlot() {
      const snrs = numbers.curve.map((p) => p.snr);
      const high = 5 * Math.ceil((Math.max(...snrs, numbers.best) + 1) / 5), low = Math.min(0, 5 * Math.floor(Math.max(Math.min(...snrs), -10) / 5));
      const y = (db) => HEIGHT.top + ((high - Math.min(Math.max(db, low), high)) / (high - low)) * HEIGHT.plot;
      const bottom = HEIGHT.top + HEIGHT.plot, under = bottom + 14, end = under + HEIGHT.shares;
      const picture = draw("svg", { viewBox: `0 0 ${width} ${end + HEIGHT.axis}`, width, height: end + HEIGHT.axis, role: "img",
        "aria-label": `SNR of ${state.site} over scales, and shares of its blocks; the slider below moves along it.` });
      const text = (px, py, content, anchor = "middle") => draw("text", { x: px, y: py, "text-anchor": anchor }, content);
      const line = (x1, y1, x2, y2, kind) => draw("line", { x1, y1, x2, y2, class: kind });
      for (let db = low; db <= high; db += 5) picture.append(line(LEFT, y(db), width - RIGHT, y(db), "grid"), text(LEFT - 6, y(db) + 4, db, "end"));
      const every = width < 500 ? 4 : 2;
      const shift = Math.log2(numbers.amax / AMAX_PER_SCALE);
      for (let tick = Math.ceil((first + shift) / every) * every; tick <= last + shift; tick += every)
        picture.append(line(x(tick - shift), HEIGHT.top, x(tick - shift), end, "grid"), text(x(tick - shift), end + 16, tick));
      picture.append(text((LEFT + width - RIGHT) / 2, end + 34, "log2 of input_scale"), text(4, 13, `SNR (dB), ${state.underflow}`, "start"));
      picture.append(draw("path", { class: "curve", d: "M" + numbers.curve.map((p) => `${x(octaveOf(p.amax)).toFixed(1)},${y(p.snr).toFixed(1)}`).join("L") }));
      areas(picture, under);
      picture.append(text(LEFT - 6, under + 8, "blocks", "end"), text(LEFT - 6, under + 22, "100 %", "end"), text(LEFT - 6, end, "0", "end"));
      for (const p of numbers.policies) {
        const mark = settings.marks[p.name];
        picture.append(draw("path", { d: mark.path, class: "mark", fill: mark.color, "data-policy": p.name,
          transform: `translate(${x(octaveOf(p.amax)).toFixed(1)} ${y(p.snr).toFixed(1)}) scale(5)`, onclick: () => go(p.name) },
          draw("title", {}, `${mark.label}: ${decibels(p.snr)}`)));
      }
      const here = x(octaveOf(at.amax));
      picture.append(line(here, HEIGHT.top, here, end, "cursor"), draw("circle", { cx: here, cy: y(at.snr), r: 4, class: "cursor" }));
      const drag = (event) => {
        if (event.type === "pointermove" && !event.buttons) return;
        const ratio = (event.clientX - plot.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT);
        go(Math.round(Math.min(Math.max(first + ratio * (last - first), first), last) * PER_OCTAVE) / PER_OCTAVE);
      };
      plot.onpointerdown = (event) => {
        if (event.target.closest(".mark")) return;
        plot.setPointerCapture(event.pointerId);
        drag(event);
      };
      plot.onpointermove = drag;
      plot.replaceChildren(picture);
    }

    /* Shares of the nonzero blocks, from the top: saturated, normal, subnormal, below E4M3. */
    function areas(picture, top) {
      const edges = numbers.curve.map((p) => [0, p.shares.saturated, 1 - p.shares.subnormal - p.shares.underflow, 1 - p.shares.underflow, 1]);
      ["saturated", "normal", "subnormal", "underflow"].forEach((name, k) => {
        const side = (edge) => numbers.curve.map((p, i) => `${x(octaveOf(p.amax)).toFixed(1)},${(top + edges[i][edge] * HEIGHT.shares).toFixed(1)}`);
        picture.append(draw("path", { class: "area", fill: settings.regimes[name], d: `M${[...side(k), ...side(k + 1).reverse()].join("L")}Z` }));
        const widest = edges.map((e, i) => [e[k + 1] - e[k], i]).filter(([share]) => share > 0.5).map(([, i]) => i);
        if (widest.length * (width / edges.length) > 64)
          picture.append(draw("text", { x: x(octaveOf(numbers.curve[widest[widest.length >> 1]].amax)), y: top + HEIGHT.shares / 2 + 4, "text-anchor": "middle" },
            name === "underflow" ? (state.underflow === "flush" ? "flushed" : "floored") : name));
      });
    }

    slider.addEventListener("input", () => go(slider.value / PER_OCTAVE));
    window.addEventListener("hashchange", () => { Object.assign(state, readState("scale", state)); refresh(); });
    await refresh();
    show();
    onWidth(plot, (wide) => { width = wide; drawPlot(); });
  };
})();
