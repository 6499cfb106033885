"use strict";
// Every two seconds, replaces what has changed in <main> by a fresh copy of the page, and gives the charts their new
// data: the scroll position, a selection and the charts' settings stay, and only the server renders.
(() => {
  const stale = document.getElementById("stale");
  let last = new Date(), busy = false;

  function replace(fresh) {
    const main = document.querySelector("main"), old = [...main.children];
    const drawn = old.filter((part) => part.matches(".chart-block"));
    const parts = [...fresh.querySelector("main").children].map((part) => {
      if (!part.matches(".chart-block")) return part;
      const kept = drawn.shift();
      kvdistillCharts.draw(kept, kvdistillCharts.read(part));
      return kept;
    });
    if (parts.length !== old.length) main.replaceChildren(...parts);
    else parts.forEach((part, place) => { if (part.outerHTML !== old[place].outerHTML) old[place].replaceWith(part); });
    document.title = fresh.title;
  }

  async function refresh() {
    if (busy || document.hidden || !getSelection().isCollapsed) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (!answer.ok) throw new Error(answer.statusText);
      replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      last = new Date();
      stale.hidden = true;
      document.body.classList.remove("old");
    } catch (error) {
      const when = last.toLocaleTimeString();
      const ended = document.querySelector("main [data-ended]")?.dataset.ended;
      stale.textContent = ended ?? `No answer since ${when}: it ended or cannot be reached. The values are from then.`;
      stale.classList.toggle("missed", !ended);
      stale.hidden = false;
      document.body.classList.toggle("old", !ended);
    }
    busy = false;
  }

  setInterval(refresh, 2000);
  document.addEventListener("visibilitychange", refresh);
})();
