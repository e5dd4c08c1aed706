"""Whether everything is there that a recipe will want, before it is begun: `eupe doctor`.

    node       what a machine says of itself: one function, called here and on every Ray node
    probe      small files that are laid into shared folders, and how fast such files are read
    facts      what is gathered: of the recipe, of this machine, of the cluster
    findings   what is judged of it: a pure function of facts for each kind of fault

What other wings refuse before they begin is not judged again: it is called.

Imported by flows alone.
"""
