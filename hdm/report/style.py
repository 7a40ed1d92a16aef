"""How the page looks: in the light, in the dark, on paper and on a telephone. No script, no font, nothing from elsewhere."""

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2024; --soft: #5b646e; --line: #c4cad1; --card: #f5f7f9;
  --better: #0c7a5c; --worse: #b4490f; --accent: #0f6fad; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4af; --line: #47505a; --card: #1d2226;
  --better: #3ec79f; --worse: #f08a52; --accent: #6bb5ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 50rem; }
.sub, figcaption, .note { color: var(--soft); font-size: .9rem; }
.claim { margin: 1rem 0; padding: .75rem 1.1rem; background: var(--card); border-left: 4px solid var(--accent);
  border-radius: 4px; }
.claim p { margin: .4rem 0; overflow-wrap: anywhere; }
.warn { margin: 1rem 0; padding: .6rem 1.1rem; background: var(--card); border-left: 4px solid var(--worse); border-radius: 4px; }
.warn ul { margin: .2rem 0; padding-left: 1.1rem; }
.warn li { overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; max-width: 52rem; height: auto; display: block; color: var(--ink); }
figure svg text { font-family: "DejaVu Sans", Verdana, system-ui, sans-serif; }
figcaption { max-width: 50rem; margin-top: .4rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; }
td { white-space: nowrap; }
#table-results td:last-child { white-space: normal; min-width: 11rem; }
.n { text-align: right; }
tr.better td:last-child { color: var(--better); font-weight: 600; }
tr.worse td:last-child { color: var(--worse); font-weight: 600; }
tr.base td { background: var(--card); }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
#table-common td { white-space: normal; overflow-wrap: anywhere; }
.gallery td, .gallery th { padding: .25rem; border: 0; text-align: center; }
.gallery th { font-weight: 400; font-size: .85rem; }
.gallery thead th { font-weight: 600; }
.gallery .prompt { max-width: 12rem; text-align: left; vertical-align: middle; }
.gallery img { display: block; margin: 0 auto; max-width: none; image-rendering: pixelated; border-radius: 2px; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--card); padding: .7rem 1rem; border-radius: 4px; }
@media print { body { max-width: none; font-size: 11px; padding: 0; } details { display: none; } }
"""
