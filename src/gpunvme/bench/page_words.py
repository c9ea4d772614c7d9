"""What a report says about its words, and how it looks."""

from __future__ import annotations

WORDS = (
    ("gpunvme", "this library: File.read_into, File.gather and File.write_from, called as a user calls them"),
    ("today's ways", "what people use without it: pread on one or many threads, mmap and a copy. Also called peers"),
    (
        "limit",
        (
            "what the machine can do at most, measured in the same run: raw O_DIRECT reads and fio, which leave what "
            "they read in host memory; for data that is cached and goes to a GPU, a copy from page-locked memory. "
            "Where a part is cached the limit still reads all of it from the drive, so that more than 1.00× is "
            "possible. Nor is a drive equally fast in every run"
        ),
    ),
    ("hot", "all of it is in the page cache, the kernel's copy of files in memory: no drive takes part"),
    (
        "cold",
        "nothing of it is in the page cache: the drive has to be read. What the drive itself keeps is out of reach",
    ),
    ("first half cached, every other MiB cached", "half of it is in the page cache, in one piece or scattered"),
    ("sequential", "from the start of the file to its end, in requests of the size given"),
    ("random", "blocks at places of the file chosen at random, the same ones for everybody"),
    ("O_DIRECT", "reading past the page cache, straight from the drive"),
    ("depth", "how many requests are in flight at once"),
    ("knee", "the smallest request and depth that reach 90 % of the best: more pays little"),
    ("median, spread", "the middle one of several runs; how far the slowest and the fastest lie from it"),
    ("p50, p90, p99", "of 100 requests, 50, 90 or 99 took no longer than this"),
    ("ratio, ×", "one rate divided by another: 2.00× is twice as fast, 0.50× half as fast"),
    ("MB/s, GB/s", "a million, a thousand million bytes a second; IOPS are requests a second"),
    ("KiB, MiB, GiB", "1024 bytes, 1024 KiB, 1024 MiB"),
    ("page-locked memory", "host memory that stays where it is, so that a GPU copies it at full speed"),
)

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1f2937; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 28px 64px; background: #fff; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .4em 0; }
h2 { font-size: 1.25rem; margin: 2em 0 .6em; padding-top: .6em; border-top: 1px solid #e5e7eb; }
h3 { font-size: 1rem; margin: 1.4em 0 .4em; }
p, li, dd { max-width: 76ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; vertical-align: top; border-bottom: 1px solid #eef0f3; }
th { color: #4b5563; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; }
.facts thead { display: none; }
details td:nth-child(2), details td:last-child, details th:nth-child(2), details th:last-child { text-align: left; }
details td:last-child { min-width: 22em; }
tr.ours td { font-weight: 600; }
tr.limit td { color: #c2410c; }
.figure { white-space: nowrap; }
small { color: #6b7280; }
.win { color: #15803d; font-weight: 600; }
.loss { color: #b91c1c; font-weight: 600; }
.same { color: #4b5563; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 12px 28px; }
.grid figure { align-self: start; }
figure { margin: 0 0 1em; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: 4px; }
figure svg { display: block; width: 100%; height: auto; max-width: 760px; }
dt { font-weight: 600; }
dd { margin: 0 0 .5em 1.2em; }
summary { cursor: pointer; }
@media print { main { max-width: none; } details > * { display: block; } }
"""
