"""Ten minutes on a GPU that say whether all of this works there, how fast, and in how much memory

    python tests/gpu_check.py --out DIR   # 550 seconds at most after the first import; with --fast 250

Each step runs in a process of its own with a time limit of its own, and appends rows to DIR/rows.jsonl as
soon as they are known; what a step prints is in DIR/STEP.log. No failure stops the others. Without a GPU four
of the steps run in small. With several GPUs a last step follows, for all of them together, with 270 (240)
seconds more. Data are made beforehand in DIR/data, unless they were carried here (`gpu_bundle.py`). Rows
become a table with `cramlit report --runs DIR --out paper_figures/gpu`.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import gpu_bundle

STEPS = {  # name → seconds; seconds with --fast
    'machine': (30, 20), 'functional': (70, 35), 'memory': (70, 35), 'compile': (110, 45),
    'speed': (110, 50), 'ranks': (40, 25), 'training': (120, 40)}
SEVERAL = {'gpus': (270, 240)}  # on several GPUs
ON_CPU = ('machine', 'functional', 'compile', 'ranks')  # in small
STAMP = ('commit', 'dirty', 'versions', 'hardware')
PROGRAM = Path(__file__).with_name('gpu_steps.py')


def read(out: Path) -> list[dict]:
    "The rows so far; a process that was killed may have left half a line"
    rows = []
    for line in (out/'rows.jsonl').read_text().splitlines() if (out/'rows.jsonl').exists() else ():
        with suppress(ValueError): rows.append(json.loads(line))
    return rows


def environment() -> dict[str, str]:
    "Of the steps: they find this package, and what was carried with it"
    places = [*gpu_bundle.places(), os.environ.get('PYTHONPATH', '')]  # where a cluster may have its torch
    return os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, places)))


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
    return lines[-1] if lines else ''


def run_step(name: str, out: Path, data: Path, fast: bool, limit: float):
    "One step to its end or to its limit, and a row of how it ended"
    began, log = time.monotonic(), out/f'{name}.log'
    options = ['--out', out, '--data', data, '--until', str(began + limit), *['--fast']*fast]
    with open(log, 'wb') as f:
        process = subprocess.Popen([sys.executable, PROGRAM, name, *options], env=environment(), stdout=f,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try: outcome = 'done' if process.wait(limit) == 0 else 'failed'
        except subprocess.TimeoutExpired: outcome = 'out of time'
        finally:  # whatever it has started goes with it
            with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - began
    rows = read(out)
    stamp = next(({k: r[k] for k in STAMP} for r in rows if 'commit' in r), {})
    row = dict(metric='seconds', value=round(seconds, 1), unit='s', stage='gpu_check', step=name,
               kind='measured', outcome=outcome, why=last_line(log) if outcome == 'failed' else '', **stamp)
    with open(out/'rows.jsonl', 'a') as f: f.write('\n'*unfinished(out) + json.dumps(row) + '\n')
    tell(row, [r for r in rows if r.get('step') == name and r['metric'] == 'passed'])


def unfinished(out: Path) -> bool:
    path = out/'rows.jsonl'
    return path.exists() and not path.read_bytes().endswith(b'\n')


def tell(row: dict, checks: list[dict]):
    "A step in one line, and a line for each check that failed"
    failed = [r for r in checks if r['value'] == 0]
    counts = [(sum(bool(r['value']) for r in checks), 'passed'), (len(failed), 'failed'),
              (sum(r['value'] is None for r in checks), 'left out for want of time')]
    said = ', '.join(f'{n} {what}' for n, what in counts if n) or 'nothing checked'
    print(f"{row['step']:<11}{row['value']:5.0f} s  {row['outcome']}: {said}. {row['why']}", flush=True)
    for r in failed:
        about = ', '.join(str(r[k]) for k in ('form', 'precision', 'shape', 'phase', 'recipe') if k in r)
        print(f"    {r['check']} ({about}): {r['why']}", flush=True)


def count_gpus() -> int:
    "How many there are; and with this the libraries are in memory, or it is known that some cannot be loaded"
    command = [sys.executable, PROGRAM, 'count']
    return int(subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True).stdout)


def check(out: Path, data: Path, fast: bool, steps: list[str]) -> bool:
    "All steps, in order; did all of them end well?"
    gpus, before, allowed, began = count_gpus(), len(read(out)), 0., time.monotonic()
    here = [*STEPS, *(SEVERAL if gpus > 1 else ())] if gpus else ON_CPU
    for name in steps or here:
        allowed += (STEPS | SEVERAL)[name][fast]*(1 if gpus else 100)  # a CPU is for tests
        left = began + allowed - time.monotonic()  # with what earlier steps have left over
        run_step(name, out, data, fast, left)
    rows = read(out)[before:]
    failed = any(r['metric'] == 'passed' and r['value'] == 0 for r in rows)
    return not failed and all(r.get('outcome', 'done') == 'done' for r in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder for rows and logs')
    parser.add_argument('--fast', action='store_true', help='250 seconds instead of 550')
    parser.add_argument('--data', type=Path, help='of gpu_bundle.py; default: carried, or made in OUT')
    parser.add_argument('--steps', nargs='+', default=[], choices=[*STEPS, *SEVERAL], metavar='STEP',
                        help=f"only these: {' '.join(STEPS | SEVERAL)}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    carried = gpu_bundle.ROOT/'gpu_data'
    data = args.data or (carried if carried.exists() else args.out/'data')
    sys.path[:0] = gpu_bundle.places()
    gpu_bundle.prepare_data(data)
    sys.exit(not check(args.out, data, args.fast, args.steps))


if __name__ == '__main__': main()
