"""How a page looks: light and dark, from phones to wide screens, and on paper.

Colours of lines are after Okabe and Ito's, darker on white and lighter on black, where they have a contrast of three to one.
"""

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1b2430; --soft: #4d5a6b; --rule: #d9dee6;
  --link: #0b5cad; --focus: #0b5cad; --c0: #0072b2; --c1: #c24a00; --c2: #007f5c; --c3: #9c4a83; --c4: #5b5fc7;
  --bad: #a4290f; --bad-ground: #fdeeea; --good: #0f6b3c; --grid: #e4e8ee; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --ground: #10151c; --card: #19212b; --ink: #e6ebf2; --soft: #a9b6c6;
  --rule: #303c4b; --link: #7fbcff; --focus: #9accff; --c0: #56b4e9; --c1: #f0a04b; --c2: #35c79b; --c3: #e29bc8;
  --c4: #a5a8ff; --bad: #ffa48f; --bad-ground: #37211d; --good: #6fd8a0; --grid: #2a3441; --shade: #000a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: break-word; }
header, main, footer { max-width: 78rem; margin: 0 auto; padding: 0 clamp(0.9rem, 3vw, 2rem); }
header { padding-top: 2rem; }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.3rem); line-height: 1.2; margin: 0.15rem 0 0.3rem; letter-spacing: -0.015em; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 0.9rem; letter-spacing: -0.01em; scroll-margin-top: 1rem; }
h1, h2, h3 { overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 0.6rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
a { color: var(--link); }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.kicker { margin: 0; color: var(--soft); font-weight: 600; letter-spacing: 0.06em; text-transform: uppercase;
  font-size: 0.78rem; }
.lead { margin: 0; color: var(--soft); max-width: 60rem; }
.skip { position: absolute; left: 0.8rem; top: -4rem; background: var(--card); color: var(--link); padding: 0.5rem 0.9rem;
  border: 2px solid var(--focus); border-radius: 0.4rem; z-index: 2; }
.skip:focus { top: 0.8rem; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; border-radius: 0.25rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0.4rem; padding: 0; margin: 1.2rem 0 0; }
nav a { display: inline-block; padding: 0.25rem 0.8rem; border: 1px solid var(--rule); border-radius: 2rem;
  background: var(--card);
  text-decoration: none; font-size: 0.92rem; }
nav a:hover { border-color: var(--link); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.8rem; margin: 1.6rem 0 0; }
.tile, .finding, .chart, .scroll { background: var(--card); border: 1px solid var(--rule); border-radius: 0.7rem; }
.tile { padding: 0.8rem 1rem; display: flex; flex-direction: column; }
.tile dt { color: var(--soft); font-size: 0.85rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.55rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .since { color: var(--soft); font-size: 0.85rem; }
.course { margin-top: 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 1rem; }
.chart { margin: 0; padding: 1rem 1rem 0.7rem; min-width: 0; }
.unit { color: var(--soft); font-weight: 400; font-size: 0.85rem; margin-left: 0.35rem; }
.plot { display: grid; grid-template-columns: max(4.6rem, var(--ys)) 1fr; grid-template-rows: 13.5rem 1.5rem;
  font-size: 0.75rem; margin-right: 0.6rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.box svg { display: block; width: 100%; height: 100%; overflow: visible; }
.ys, .xs { position: relative; }
.ys span { position: absolute; right: 0.5rem; transform: translateY(-50%); white-space: nowrap; }
.xs { grid-column: 2; }
.xs span { position: absolute; top: 0.3rem; transform: translateX(-50%); white-space: nowrap; }
.grid { stroke: var(--grid); stroke-width: 1; vector-effect: non-scaling-stroke; fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.line.faint { stroke-width: 1; opacity: 0.4; }
.dots.faint { opacity: 0.4; }
.dots { fill: none; stroke-width: 7; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.band { stroke: none; opacity: 0.28; }
.band.faint { opacity: 0.14; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
  .c4 { stroke: var(--c4); }
.band.c0 { fill: var(--c0); } .band.c1 { fill: var(--c1); } .band.c2 { fill: var(--c2); } .band.c3 { fill: var(--c3); }
.band.c0, .band.c1, .band.c2, .band.c3 { stroke: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0.5rem 0 0; padding: 0;
  font-size: 0.86rem; }
.legend li { display: flex; align-items: center; gap: 0.45rem; min-width: 0; overflow-wrap: anywhere; }
.swatch { width: 28px; height: 14px; flex: none; }
.spark { width: 8rem; height: 1.6rem; display: block; }
.note { color: var(--soft); font-size: 0.86rem; margin: 0.4rem 0 0; }
.findings { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.finding { padding: 0.9rem 1.1rem; border-left: 0.35rem solid var(--bad); }
.finding p { margin: 0 0 0.4rem; }
.finding.none { border-left-color: var(--good); }
.finding.unjudged { border-left-color: var(--soft); }
.scroll { overflow-x: auto; margin: 0 0 1rem; max-width: 100%; background:
  linear-gradient(90deg, var(--card) 1.2rem, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(-90deg, var(--card) 1.2rem, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) left / 1.2rem 100% no-repeat scroll,
  linear-gradient(-90deg, var(--shade), transparent) right / 1.2rem 100% no-repeat scroll, var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption span { display: block; max-width: calc(100vw - 4rem); }
caption { text-align: left; padding: 0.8rem 1rem 0.4rem; font-weight: 600; }
th, td { padding: 0.4rem 1rem; text-align: left; border-top: 1px solid var(--rule); vertical-align: top; min-width: 4rem; }
td, th { max-width: 30rem; }
thead th { color: var(--soft); font-weight: 600; font-size: 0.85rem; border-top: 0; white-space: nowrap; }
tbody th { font-weight: 500; }
.n { text-align: right; white-space: nowrap; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 0 1rem;
  align-items: start; }
details { margin: 0.5rem 0 0; }
summary { cursor: pointer; color: var(--link); font-size: 0.9rem; padding: 0.15rem 0; }
details .scroll { margin: 0.5rem 0; border-radius: 0.4rem; }
.chart details table { font-size: 0.82rem; }
.prose { max-width: 60rem; }
img { max-width: 100%; height: auto; border-radius: 0.7rem; border: 1px solid var(--rule); background: #fff; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
footer { color: var(--soft); font-size: 0.88rem; padding-top: 2.5rem; padding-bottom: 2.5rem; }
@media (max-width: 30rem) { .plot { grid-template-columns: max(3.9rem, var(--ys)) 1fr; grid-template-rows: 11.5rem 1.5rem; }
  th, td { padding: 0.35rem 0.6rem; } thead th, thead .n { white-space: normal; }
  caption { padding: 0.6rem 0.6rem 0.3rem; } .chart { padding: 0.8rem 0.7rem 0.5rem; } }
@media print { body { background: #fff; } .skip, nav, details { display: none; } .chart, .finding { break-inside: avoid; } }
"""
