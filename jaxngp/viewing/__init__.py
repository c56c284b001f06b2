"""Looking at a scene in a browser while it is trained, or afterwards.

    camera of a browser window --poses--> Viewpoint --drawing, in a Worker's thread--> picture --panel--> browser

Only `panel` knows viser, the library that shows pictures and controls in a browser. Its threads note what a window asks
for, and one thread, the `Worker`'s, draws it: in pieces, so that what has become urgent never waits for long. `pacing`
decides how many pixels a picture has; `paths` are camera paths; `viewer` is what a training loop holds.
"""
