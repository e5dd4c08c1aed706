"""Is the student any good: figures, pictures and one report of a run.

frozen.py      a trained student and the images it is judged by, each opened and built once
labels.py      what the images are labelled, numbered alike
compare.py     one pass over images: summaries, cosines to teachers and to the best constant
networks.py    every encoder of a run by name, at every resolution, and what it makes of the images
encoders.py    every encoder judged alike: kNN in two protocols, linear probe, likeness
during.py      the hook that training calls: held-out figures as it goes
evaluate.py    encoders, and students beside their teachers: evaluation.json, correct.parquet
anybody.py     anybody's models in the same table, without a run
pyramid.py     what a stage made of its student, at every resolution
tables.py      a summary as tables and sentences
figures.py     loss curves, the dot plot and token pictures
report.py      summary.json and report.html

Arrows: report -> evaluate, pyramid, figures -> networks, encoders, tables -> compare, frozen.
Nothing here is imported by training: a stage is handed `during.hook` by whoever starts it.
"""
