"""Studies of the paper's claims on real text: cells to run, and the page made of their results.

`launch/replicate.py` is the command. A study is a module with `cells` (what is run), `claims` and
`section` (what the page says of it); `grid.STUDIES` lists them.
"""
