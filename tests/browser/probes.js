// SPDX-License-Identifier: Apache-2.0
// Copyright The NVFP4 Calibration Book authors
// What the tests ask a drawn page. Each probe returns a list of findings: empty is good.
() => {
  const words = (e) => (e.getAttribute("aria-label") || e.textContent).trim().replace(/\s+/g, " ").slice(0, 60);
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const all = (selector) => [...document.querySelectorAll(selector)].filter(shown);

  const wide = () => {
    const width = document.documentElement.clientWidth;
    const total = Math.max(document.body.scrollWidth, document.documentElement.scrollWidth);
    return total > width + 1 ? [`page of ${total} px in a window of ${width}`] : [];
  };

  // Font size on the screen: what the style says, times what the drawing is scaled by.
  const smallText = () =>
    all("figure svg text, figure svg tspan").flatMap((e) => {
      const m = e.closest("text").getScreenCTM();
      const size = parseFloat(getComputedStyle(e).fontSize) * Math.hypot(m.a, m.b);
      return size < 7.95 ? [`${size.toFixed(1)} px: ${words(e)}`] : [];
    });

  // Colours as [r, g, b, alpha]; contrast as WCAG 2.1 defines it.
  const channels = (color) => {
    const v = color.match(/[\d.]+/g).map(Number);
    const rgb = color.startsWith("color(") ? v.slice(0, 3).map((c) => 255 * c) : v.slice(0, 3);
    return [...rgb, v[3] ?? 1];
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const over = (top, ground) => [0, 1, 2].map((i) => top[i] * top[3] + ground[i] * (1 - top[3])).concat(1);
  const ground = (e) => {
    const layers = [];
    for (; e && (layers.at(-1)?.[3] ?? 0) < 1; e = e.parentElement) {
      const layer = channels(getComputedStyle(e).backgroundColor);
      if (layer[3] > 0) layers.push(layer);
    }
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const paleText = () => {
    const found = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode()); ) {
      const e = node.parentElement;
      if (!node.textContent.trim() || e.closest("svg, script, style, noscript, dialog, .headerlink") || !shown(e)) continue;
      const below = ground(e);
      const ratio = contrast(over(channels(getComputedStyle(e).color), below), below);
      if (ratio < 4.495) found.set(`${ratio.toFixed(2)}: ${e.tagName}.${e.className} ${words(e)}`, 1);
    }
    return [...found.keys()];
  };

  // On white paper; white text stands on a painted field.
  const paleFigureText = () =>
    all("figure svg text").flatMap((e) => {
      const fill = getComputedStyle(e).fill;
      const ratio = contrast(channels(fill), [255, 255, 255, 1]);
      return fill !== "rgb(255, 255, 255)" && ratio < 4.495 ? [`${ratio.toFixed(2)}: ${words(e)} in ${fill}`] : [];
    });

  // A reader who has not scrolled sees at least the first cell beside the row's name.
  const unseenNumbers = () =>
    all("article table").flatMap((table) => {
      const cell = [...table.querySelectorAll("tbody td")].find(shown);
      if (!cell) return [];
      let right = document.documentElement.clientWidth;
      for (let e = table.parentElement; e; e = e.parentElement)
        if (getComputedStyle(e).overflowX !== "visible") right = Math.min(right, e.getBoundingClientRect().right);
      const box = cell.getBoundingClientRect();
      const visible = Math.min(box.right, right) - box.left;
      return visible < Math.min(box.width, 100) - 1 ? [`${visible.toFixed(0)} px of ${words(cell)} in ${words(table)}`] : [];
    });

  const unreachable = () =>
    all("article *").flatMap((e) => {
      const scrolls = ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1;
      return scrolls && e.tabIndex < 0 ? [`${e.tagName}.${e.className}: ${words(e)}`] : [];
    });

  const unseenOutput = () =>
    [...document.querySelectorAll("article .cell_output, article .cell_output > *")].flatMap((e) =>
      e.textContent.trim() && !shown(e) && !e.closest("details:not([open])") ? [words(e)] : []);

  const invisibleIcons = () =>
    all("[class*='fa-']").flatMap((e) => {
      const content = getComputedStyle(e, "::before").content;
      const drawn = e.tagName === "svg" || (content !== "none" && content !== "normal");
      return drawn ? [] : [e.className];
    });

  return {
    "wider than the window": wide(),
    "figure text under 8 px": smallText(),
    "pale text": paleText(),
    "pale figure text": paleFigureText(),
    "numbers out of sight": unseenNumbers(),
    "scroll area that no key reaches": unreachable(),
    "output that is not shown": unseenOutput(),
    "icon without a drawing": invisibleIcons(),
  };
};
