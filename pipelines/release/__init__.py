"""What leaves the house: a student as others read it, and anybody's pictures through a model.

models.py      what somebody names is a network, its weights and how pictures go in
layouts.py     timm's folder, the released files' names, heads: written and read again
graph.py       ONNX, compared with the network on pictures
licences.py    what a student may be used for, by what its teachers and pictures may be
card.py        README.md of an exported student
export.py      all of that as one folder, which appears whole
encode.py      pictures to embeddings, their map, their neighbours and patches
explore.py     such a table in a browser

Arrows: export -> card, graph, layouts -> licences, models; encode -> models.
"""
