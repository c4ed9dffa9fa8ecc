"use strict";
/* Draws the figures in the theme that is shown, and shows the recipe of the point that is chosen. */
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  let shown = Number(document.querySelector("[data-point][aria-pressed=true]")?.dataset.point ?? 0);

  const colour = (name) => {
    probe.style.color = name;
    return getComputedStyle(probe).color;
  };

  /* A copy of a figure with colours in place of their names. */
  const themed = (value) => {
    if (typeof value === "string") return value.startsWith("var(--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, own]) => [key, themed(own)]));
  };

  const isFront = (place) => place.id === "chart-front";

  /* The ring lies around the point that is shown. */
  const ringed = (figure) => {
    const [ring, points] = ["ring", "front"].map((uid) => figure.data.find((own) => own.uid === uid));
    ring.x = [points.x[shown]];
    ring.y = [points.y[shown]];
    return figure;
  };

  /* The point of the front whose mark is under the pointer, even where another mark covers it. */
  const nearest = (place, x, y) => {
    const far = [...place.querySelectorAll(".tracefront .point")].map((mark) => {
      const box = mark.getBoundingClientRect();
      return Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y);
    });
    const least = Math.min(...far);
    return least <= 14 ? far.indexOf(least) : -1;
  };

  const draw = (place, width) => {
    if (!place.offsetParent) return; /* it is drawn when it is shown */
    const copy = themed(figures[place.dataset.figure]);
    const figure = isFront(place) ? ringed(copy) : copy;
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    if (width) figure.layout.width = width;
    Plotly.react(place, figure.data, figure.layout, { displayModeBar: false });
    if (isFront(place) && !place.dataset.heard) {
      place.dataset.heard = "yes";
      place.on("plotly_click", ({ event }) => {
        const index = nearest(place, event.clientX, event.clientY);
        if (index >= 0) show(index);
      });
    }
  };
  const charts = [...document.querySelectorAll(".chart")];
  const drawAll = (width) => charts.forEach((place) => draw(place, width));

  const show = (index) => {
    document.getElementById(`point-${shown}`).hidden = true;
    shown = index;
    const panel = document.getElementById(`point-${index}`);
    panel.hidden = false;
    document.querySelectorAll("[data-point]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.point) === index));
    });
    document.getElementById("said").textContent = panel.dataset.said;
    panel.querySelectorAll(".chart").forEach((place) => draw(place));
    draw(document.getElementById("chart-front"));
  };
  document.querySelectorAll("[data-point]").forEach((button) => {
    button.addEventListener("click", () => show(Number(button.dataset.point)));
  });

  const menus = [...document.querySelectorAll("select[data-draws]")];
  menus.forEach((menu) => {
    menu.addEventListener("change", () => {
      const name = menu.dataset.draws;
      const place = document.getElementById(`chart-${name}`);
      const values = menus.filter((own) => own.dataset.draws === name).map((own) => own.value);
      place.dataset.figure = [name, ...values].join(".");
      draw(place);
    });
  });

  const selected = (code) => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  document.querySelectorAll("[data-copies]").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = document.getElementById(button.dataset.copies);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        /* where a browser forbids it the text is marked, one key away from copied */
        selected(code);
        button.textContent = document.execCommand("copy") ? "Copied" : "Marked: press Ctrl+C";
      }
      document.getElementById("said").textContent = button.textContent;
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  });

  const system = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const told = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
  const retheme = () => { told(); drawAll(); };
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    retheme();
  });
  system.addEventListener("change", retheme);

  let printing = false;
  addEventListener("resize", () => {
    if (printing) return;
    charts.filter((place) => place.offsetParent).forEach((place) => Plotly.Plots.resize(place));
  });

  /* paper is light and 17.5 cm wide */
  let before;
  addEventListener("beforeprint", () => {
    printing = true;
    before = root.dataset.theme;
    root.dataset.theme = "light";
    drawAll(660);
  });
  addEventListener("afterprint", () => {
    printing = false;
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    drawAll();
  });

  told();
  drawAll();
})();
