// Keeps a page live: after each look at Redis it fetches the page again and puts the parts marked data-live in place.
// All text was escaped by the server. Parts are compared first, so that what did not change is not touched.
"use strict";

(() => {
  const REST_MS = 900; // between two fetches of one page
  const LOST_MS = 20000; // without a message the connection counts as lost
  const live = document.getElementById("live");
  const liveText = document.getElementById("live-text");
  const liveTime = document.getElementById("live-time");
  let heard = Date.now();
  let problem = "";
  let shown = ""; // what the live line says
  let wanted = false; // there was a look since the last fetch
  let isFetching = false;

  function say(text, kind) {
    if (text === shown) return; // a screen reader speaks only when it changes
    shown = text;
    liveText.textContent = text;
    live.className = "live " + kind;
  }

  function clock(seconds) {
    return seconds ? new Date(seconds * 1000).toISOString().slice(11, 19) : "–";
  }

  function put(fresh) {
    for (const part of document.querySelectorAll("[data-live][id]")) {
      const now = fresh.getElementById(part.id);
      if (!now || now.innerHTML === part.dataset.known) continue;
      if (part.dataset.known === undefined && now.innerHTML === part.innerHTML) continue;
      part.dataset.known = now.innerHTML;
      const focused = part.contains(document.activeElement) ? document.activeElement : null;
      const mark = focused && [...part.querySelectorAll("a, button, summary, [tabindex]")].indexOf(focused);
      const href = focused && focused.getAttribute("href");
      const opened = [...part.querySelectorAll("details[open] > summary")].map((one) => one.textContent);
      const scrolled = [...part.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
      part.replaceChildren(...document.adoptNode(now).childNodes);
      for (const one of part.querySelectorAll("details > summary"))
        if (opened.includes(one.textContent)) one.parentElement.open = true;
      part.querySelectorAll(".scroll").forEach((one, i) => { one.scrollLeft = scrolled[i] || 0; });
      if (focused) {
        const all = [...part.querySelectorAll("a, button, summary, [tabindex]")];
        const same = all.find((one) => href && one.getAttribute("href") === href) || all[mark];
        if (same) same.focus({ preventScroll: true });
      }
    }
  }

  async function refresh() {
    if (isFetching || !wanted || document.hidden) return;
    isFetching = true;
    wanted = false;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store" });
      if (answer.redirected && new URL(answer.url).pathname === "/login") { location.assign(answer.url); return; }
      const type = answer.headers.get("content-type") || "";
      if (type.startsWith("text/html")) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        if (fresh.title !== document.title) { location.reload(); return; } // what it shows was removed, or is back
        put(fresh);
      }
      await Promise.all(charts.map((one) => one.refresh()));
    } catch (error) {
      wanted = true; // the dashboard may be restarting
    } finally {
      setTimeout(() => { isFetching = false; refresh(); }, REST_MS);
    }
  }

  // ---- charts ------------------------------------------------------------------------------------------------------

  const sources = new Map(); // address → the promise of its content, shared by the charts of a page

  function load(address) {
    if (!sources.has(address)) {
      const content = fetch(address, { credentials: "same-origin", cache: "no-store" })
        .then((answer) => (answer.ok ? answer.json() : null))
        .finally(() => setTimeout(() => sources.delete(address), REST_MS / 2));
      sources.set(address, content);
    }
    return sources.get(address);
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function curves(content) {
    return content.validation_curves || (content.validation_curve ? [{ worker: content.name, ...content.validation_curve }] : []);
  }

  // Each kind gives: x and, for each line, a label and its values.
  const kinds = {
    training: (content) => ({ x: content.training_curve.version, lines: [["loss", content.training_curve.loss]] }),
    throughput: (content) => ({ x: content.throughput.at, lines: [["updates/min", content.throughput.updates_per_min]], isTime: true, isStepped: true }),
    validation: (content) => {
      const found = curves(content).filter((one) => one.version.length);
      const x = [...new Set(found.flatMap((one) => one.version))].sort((a, b) => a - b);
      const lines = found.map((one) => {
        const at = new Map(one.version.map((version, i) => [version, one.loss[i]]));
        return [one.worker, x.map((version) => (at.has(version) ? at.get(version) : null))];
      });
      return { x, lines };
    },
  };

  // UTC, 24 hours; the day only where the axis is longer than one.
  function hours(u, splits) {
    const isLong = splits.length > 1 && splits[splits.length - 1] - splits[0] > 86400;
    const isShort = splits.length > 1 && splits[1] - splits[0] < 60;
    return splits.map((at) => {
      const text = new Date(at * 1000).toISOString();
      return isLong ? text.slice(5, 16).replace("T", " ") : text.slice(11, isShort ? 19 : 16);
    });
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.box = figure.querySelector(".plot");
      this.nothing = figure.querySelector(".nothing");
      this.drawn = "";
      this.plot = null;
      new ResizeObserver(() => {
        if (this.plot) this.plot.setSize({ width: this.box.clientWidth, height: 230 });
      }).observe(this.box);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.drawn = ""; this.labels = ""; this.refresh(); });
    }

    async refresh() {
      const content = await load(this.figure.dataset.source);
      if (!content) return;
      const { x, lines, isTime, isStepped } = kinds[this.figure.dataset.chart](content);
      const text = JSON.stringify([x, lines]);
      if (text === this.drawn) return;
      this.drawn = text;
      this.nothing.hidden = x.length > 0 && lines.length > 0;
      const data = [x, ...lines.map(([, values]) => values)];
      const labels = JSON.stringify(lines.map(([label]) => label));
      if (this.plot && labels === this.labels) { this.plot.setData(data); return; }
      this.labels = labels;
      if (this.plot) this.plot.destroy();
      this.plot = x.length && lines.length ? new uPlot(this.options(lines, isTime, isStepped), data, this.box) : null;
    }

    options(lines, isTime, isStepped) {
      const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid"), width: 1 }, font: "12px system-ui, sans-serif" };
      const dashes = [[], [6, 3], [2, 3], [9, 3, 2, 3]]; // not told apart by colour alone
      const isShort = (u) => u.data[0].length < 60;
      return {
        width: this.box.clientWidth,
        height: 230,
        tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "UTC"),
        scales: { x: { time: Boolean(isTime) }, ...(isStepped ? { y: { range: (u, low, high) => [0, high > 0 ? high * 1.1 : 1] } } : {}) },
        axes: [{ ...axis, space: 70, ...(isTime ? { values: hours } : { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 1e5, 1e6] }) }, { ...axis, size: 56 }],
        legend: { show: lines.length > 1, live: false },
        cursor: { drag: { x: false, y: false } },
        series: [{}, ...lines.map(([label], i) => ({
          label,
          stroke: colour(`--c${(i % 6) + 1}`),
          width: 2,
          dash: dashes[Math.floor(i / 6) % dashes.length].length ? dashes[Math.floor(i / 6) % 4] : dashes[i % 4],
          spanGaps: true,
          ...(isStepped ? { paths: uPlot.paths.stepped({ align: 0 }), fill: colour("--c1") + "22" } : {}),
          points: isStepped ? { show: false } : { show: isShort, size: 5 },
        }))],
      };
    }
  }

  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure));
  charts.forEach((one) => one.refresh());

  // ---- the event stream --------------------------------------------------------------------------------------------

  const stream = new EventSource("/api/v1/events");
  stream.addEventListener("look", (message) => {
    const look = JSON.parse(message.data);
    heard = Date.now();
    problem = look.problem;
    liveTime.textContent = clock(look.at);
    say(problem ? "Redis away, as of" : "Live", problem ? "is-away" : "is-live");
    wanted = true;
    refresh();
  });
  stream.addEventListener("error", () => say("Connection lost, as of", "is-away"));
  setInterval(() => { if (Date.now() - heard > LOST_MS) say("Connection lost, as of", "is-away"); }, 5000);
  document.addEventListener("visibilitychange", refresh);
})();
