"""Is the student any good: figures, pictures and one report of a run.

frozen.py      a trained student and the images it is judged by, each opened and built once
compare.py     one pass over images: cosines to teachers and to the best constant
knn.py         top-1 among neighbours by a label
during.py      the hook that training calls: held-out figures as it goes
evaluate.py    a stage's student beside the untrained one
pyramid.py     what a stage made of its student, at every resolution
figures.py     loss curves and token pictures
report.py      summary.json, report.html and the closing table

Arrows: report -> evaluate, pyramid, figures -> knn -> compare, frozen; during -> knn. Nothing here
is imported by training: a stage is handed `during.hook` by whoever starts it.
"""
