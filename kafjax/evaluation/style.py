"""The report's style sheet: light and dark by the reader's preference, narrow and wide screens,
print."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1c2128; --soft: #5b6570; --line: #d9dee4; --page: #ffffff; --panel: #f6f8fa;
  --accent: #0072b2; --right: #00795a; --wrong: #b84a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --soft: #9aa5b1; --line: #343c46; --page: #14181d; --panel: #1c2229;
    --accent: #6cb8ea; --right: #3fbf95; --wrong: #f08c4a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; }
p.sub, .notes, figcaption { color: var(--soft); }
.notes { font-size: .82rem; margin: .5rem 0 0; max-width: 62rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th {
  border-top: 0; background: var(--panel); color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal;
}
th:first-child { text-align: left; position: sticky; left: 0; background: var(--panel); }
tbody tr:hover td { background: var(--panel); }
tbody tr:first-child > * { border-top: 0; }
thead + tbody tr:first-child > * { border-top: 1px solid var(--line); }
td small { color: var(--soft); }
.figures { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; }
figure:first-child { grid-column: 1 / -1; }
figure img {
  display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem;
}
figcaption { font-size: .85rem; margin-top: .4rem; }
.hints {
  background: var(--panel); border-left: 3px solid var(--accent); border-radius: 0 8px 8px 0; margin: 1.4rem 0; padding: .8rem 1.2rem;
}
.hints ul { margin: .2rem 0 0; padding-left: 1.1rem; }
details { border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0; padding: .5rem .9rem; }
summary { cursor: pointer; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; }
.sample { border-top: 1px solid var(--line); margin-top: .6rem; padding-top: .6rem; font-size: .88rem; }
.sample b { margin-right: .4rem; }
.sample div { overflow-wrap: anywhere; }
.sample .soft { color: var(--soft); }
.right b.mark { color: var(--right); }
.wrong b.mark { color: var(--wrong); }
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px; font-size: .82rem; overflow-x: auto; padding: .8rem 1rem;
}
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .85rem; margin: 1rem 0 0; }
a { color: var(--accent); }
.answers .bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; font-size: .85rem; }
.answers label { display: flex; gap: .4rem; align-items: center; max-width: 100%; }
select, input, button {
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; color: var(--ink); font: inherit; max-width: 100%;
  min-width: 0; padding: .25rem .5rem;
}
.answers details { border: 0; margin: .2rem 0 0; padding: 0; }
.answers pre { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers label[hidden] { display: none; }
.answers summary { color: var(--soft); font-weight: 400; }
.answers .soft { color: var(--soft); }
#more { margin-top: 1rem; }
@media (prefers-color-scheme: dark) { figure img { filter: invert(.9) hue-rotate(180deg); } }
@media (max-width: 40rem) {
  body { padding: 1.2rem .8rem 3rem; }
  figure { overflow-x: auto; }
  figure img { max-width: none; width: 44rem; }
}
.columns { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.columns td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
