"""The style of the page of ``moeflux compare --html``, for desktops and phones."""

STYLE = """
:root { color-scheme: light dark; --line: #8886; --quiet: #666; --good: #1f7a3d;
  --bad: #b3261e; --bar: #3b6fb5; --mark: #ffe08a; --markink: #000; --alt: #8881 }
@media (prefers-color-scheme: dark) {
  :root { --quiet: #a0a0a0; --good: #5fc27e; --bad: #f28b82; --bar: #7aa7e8 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem;
  padding: 1.5rem 1rem }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 0 .5rem }
h3 { font-size: .9rem; margin: 0 0 .25rem; color: var(--quiet) }
p { margin: .25rem 0; overflow-wrap: anywhere }
code { font-size: .9em }
.number, td { white-space: nowrap }
.quiet { color: var(--quiet) }
.good { color: var(--good) }
.bad { color: var(--bad) }
main, details { display: grid; gap: 1rem; margin-top: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
details { display: block }
details section { margin-top: 1rem }
summary { cursor: pointer; font-weight: 600 }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem;
  min-width: 0 }
.wide { grid-column: 1 / -1; min-width: 0 }
.pair { display: grid; gap: 1rem; grid-template-columns: 1fr 1fr }
.pair > div { min-width: 0 }
.text { font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border-left: 2px solid var(--line); padding-left: .6rem }
.text i { font-style: normal }
.t:nth-child(even) { background: var(--alt) }
.differs { text-decoration: underline wavy var(--bad) 1px }
mark { background: var(--mark); color: var(--markink); outline: 2px solid var(--bad) }
mark i.quiet { color: inherit }
.chart { display: grid; grid-template-columns: auto 1fr; gap: .6rem; margin-top: .5rem }
.chart > div { min-width: 0 }
.scale { display: flex; flex-direction: column; justify-content: space-between;
  height: 9rem; width: 3.6rem; text-align: right }
.scale, .feet { color: var(--quiet); font-size: .8rem; line-height: 1.2 }
.feet { display: flex; justify-content: space-between; margin: .2rem 0 0 }
svg { display: block; width: 100%; height: 9rem; border-bottom: 1px solid var(--line) }
rect { fill: var(--bar) }
rect.off { fill: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .5rem; border-top: 1px solid var(--line) }
th { font-weight: 600; vertical-align: bottom }
thead th { border-top: 0; color: var(--quiet); font-weight: 400 }
th:first-child { text-align: left; padding-left: 0; font-weight: 400 }
td:last-child, th:last-child { padding-right: 0 }
@media (max-width: 34rem) {
  .pair { grid-template-columns: 1fr 1fr; gap: .5rem }
  .text { font-size: 12px; padding-left: .35rem } }
"""
