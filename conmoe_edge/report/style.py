"""The page's looks, and the little that moves: no fonts, no images, nothing from anywhere else.

Pictures are SVG that stretches with its box; all text is HTML beside it, so that nothing shrinks on a phone. Colours
are two hues that colour-blind readers can tell apart, and shapes say the same.
"""

STYLE = """
:root{--ground:#fff;--text:#1c2128;--soft:#5b6470;--rule:#dfe3e8;--rail:#eef1f4;
--own:#0b5cad;--alias:#c2570c;--const:#6d4bb0;--found:#7d8793;--loss:#b4371f;
--t0:#8a94a0}
@media (prefers-color-scheme:dark){:root{--ground:#0f1317;--text:#e4e8ed;--soft:#98a2ae;--rule:#2a313a;
--rail:#1c2229;--own:#62adf5;--alias:#f3994f;--const:#b69af0;--found:#8b96a3;--loss:#f0765c;
--t0:#77818d}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:32px 20px 64px;max-width:920px;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
h1{font-size:27px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:19px;line-height:1.3;margin:0 0 4px}
h3{font-size:14px;margin:24px 0 6px}
p{margin:0}
.soft,.lead,.tip,.sub{color:var(--soft)}
.sub{margin-top:6px;overflow-wrap:anywhere}
.lead{max-width:72ch;text-wrap:pretty;margin-bottom:16px}
section{margin-top:48px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:16px 20px;margin:24px 0 0;
padding:18px 0;border:solid var(--rule);border-width:1px 0}
.facts div{display:flex;flex-direction:column}
.facts dt{order:2;color:var(--soft);font-size:13px;line-height:1.35;text-wrap:balance}
.facts dd{margin:0;font-size:21px;font-weight:600;line-height:1.3}
.fill{display:block;width:100%}
.hit{fill:transparent;stroke:none}
.tip{min-height:1.5em;margin-top:8px;font-size:13px;visibility:hidden}
.js .tip{visibility:visible}
.tip.on{color:var(--text)}
.scroll{overflow-x:auto}
.key{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0;padding:0;font-size:13px;color:var(--soft)}
.key li{display:flex;align-items:center;gap:6px;white-space:nowrap}
.key .title{color:var(--text);min-width:62px}
.keys{margin-bottom:12px;display:flex;flex-direction:column;gap:2px}
.sample{width:16px;height:16px;flex:none}
.sample.long{width:34px;height:16px}
/* charts */
figure{margin:22px 0 0}
figcaption{font-size:14px;font-weight:600;margin-bottom:2px}
.note,.upname,.acrossname{font-size:13px;color:var(--soft)}
.chart>.note{margin-bottom:8px;max-width:72ch}
.chart .upname,.chart .acrossname{display:block}
.plot{display:grid;grid-template-columns:46px minmax(0,1fr);gap:4px 8px;margin-top:4px}
.plot>.upname{grid-column:1/3}
.plot>.across,.plot>.acrossname{grid-column:2}
.up,.across{position:relative;font-size:12px;line-height:14px;color:var(--soft)}
.across{height:16px}
.up span,.across span{position:absolute;white-space:nowrap}
.up span{right:0;transform:translateY(50%)}
.across span{transform:translateX(-50%)}
.acrossname{text-align:center}
.arcs+.across{margin-top:4px}
.canvas{min-width:0;border-left:1px solid var(--rule);border-bottom:1px solid var(--rule)}
.canvas>div>svg{height:100%}
.plot+.key,.scroll+.key,.chart+.key,.chart+.keys{margin:10px 0 0}
/* memory */
.rail{fill:var(--rail)}
.process{fill:var(--t0)}.t1,.expert{fill:var(--own)}.free{fill:var(--rail)}.worth{fill:var(--const)}
.found{fill:var(--found)}
.bars{display:grid;grid-template-columns:minmax(0,21em) minmax(0,1fr) 8.5em;gap:0 18px;align-items:center;
padding:7px 0;border-top:1px solid var(--rule)}
.bars .what{display:flex;flex-direction:column;line-height:1.35}
.what .note,.bars .figures .soft{font-size:13px}
.bars .figures{grid-column:3;text-align:right;display:flex;flex-direction:column;line-height:1.35}
.bars .figures b{font-weight:600}
.bars .bar{grid-column:2;grid-row:1;height:20px;min-width:0}
.foot .scale{grid-column:2}
/* slots */
.cells{height:20px;margin:1px 0}
.prototype{fill:var(--own)}.alias{fill:var(--alias)}.constant{fill:var(--const)}.dropped{fill:var(--text)}
.cells g:hover .hit,.kept g:hover .hit,.ranking g:hover .hit{stroke:var(--text);stroke-width:1.5px;
vector-effect:non-scaling-stroke}
/* arcs */
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(270px,100%),1fr));gap:20px 28px}
.arcs{height:110px;overflow:visible}
.arcs path,.lines path,.lines polyline{vector-effect:non-scaling-stroke;fill:none}
.tick{stroke:var(--own);stroke-width:3px}
.tick.gone{stroke:var(--rule);stroke-width:2px}
.border{stroke:var(--rule);stroke-width:1px;stroke-dasharray:3 3}
.arc .hit{stroke:transparent;stroke-width:9px}
.arc .line{stroke:var(--alias);stroke-width:1.4px}
.d0{stroke-opacity:.35}.d1{stroke-opacity:.55}.d2{stroke-opacity:.78}.d3{stroke-opacity:1}
.arc:hover .line{stroke:var(--text);stroke-width:2.6px;stroke-opacity:1}
/* prototypes */
.ranking{height:110px}
.weight{fill:var(--own)}
.equal{stroke:var(--soft);stroke-width:1px;stroke-dasharray:4 4;vector-effect:non-scaling-stroke}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:16px 40px;margin-top:20px}
/* tables */
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:right;padding:5px 0 5px 12px;font-weight:400;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{color:var(--soft);font-size:13px;border:0;vertical-align:bottom}
th:first-child{text-align:left;padding-left:0}
.pair thead th:first-child{color:var(--text);font-weight:600}
.quality tbody tr:first-child>*{font-weight:600}
.exact thead th{white-space:normal}
.exact{margin-top:4px}
.quality+.lead{margin-top:20px}
.quality th:first-child{white-space:normal;overflow-wrap:anywhere;min-width:4.4em}
.barred{display:inline-block;width:100%;min-width:52px;max-width:150px}
.under{height:4px;margin-top:1px}
.loss{fill:var(--loss)}
/* hits */
.lines{height:260px;overflow:visible}
.grid{stroke:var(--rule);stroke-width:1px}
.planned{stroke:var(--text);stroke-width:1px;fill:none}
.best{stroke:var(--own);stroke-width:2.6px;fill:none}
.dot{stroke:var(--own);stroke-width:8px;stroke-linecap:round}
.lines g:hover .dot{stroke:var(--text)}
.policy{stroke:var(--soft);stroke-width:1.3px;fill:none}
.p1{stroke-dasharray:7 3}.p2{stroke-dasharray:2 3}.p3{stroke-dasharray:9 3 2 3}.p4{stroke-dasharray:4 6}
details{margin-top:12px;font-size:14px}
summary{cursor:pointer;color:var(--soft)}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--rule);font-size:13px;color:var(--soft)}
@media (max-width:560px){
body{padding:20px 16px 48px;font-size:15px}
h1{font-size:23px}
section{margin-top:40px}
.facts{grid-template-columns:1fr 1fr;gap:14px 16px}
.facts dd{font-size:19px}
.wide{display:none}
.plot{grid-template-columns:34px minmax(0,1fr);gap:4px 5px}
.foot{padding:0}
.foot .scale{grid-column:1/3}
.bars{grid-template-columns:minmax(0,1fr) auto;gap:3px 12px}
.bars .bar{grid-column:1/3;grid-row:2;height:14px}
.bars .figures{grid-column:2}
th,td{padding-left:8px}
.quality table{font-size:13px}
.quality thead th{font-size:12px}
.arcs{height:84px}
.lines{height:200px}
}
@media print{body{max-width:none}.tip{display:none}}
"""

SCRIPT = """
(function(){
document.documentElement.className="js";
document.querySelectorAll("section").forEach(function(part){
var tip=part.querySelector(".tip");
if(!tip)return;
function show(event){
var mark=event.target.closest("g");
var title=mark?mark.querySelector("title"):null;
if(!title)return;
tip.textContent=title.textContent;
tip.classList.add("on");
}
part.addEventListener("pointerover",show);
part.addEventListener("click",show);
});
})();
"""
"""Says in a line of its own what is pointed at, which a finger cannot get from a tooltip."""
