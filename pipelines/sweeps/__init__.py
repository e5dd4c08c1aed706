"""Many runs from one set of caches: what an ablation sweep asks for, and the work that is left.

    file      a sweep file: a base recipe and axes with named values; its runs
    graph     caches, stages and evaluations of all runs, equal ones once
    planned   what all of it takes, before anything is computed
    standing  what is there of a graph, what is in work, and why the rest is not there
    work      does what is left, whatever other processes do of it meanwhile
    results   every figure of every run, and each setting beside the base
    page      the same for people to look at, beside raw pixels and experts

A sweep is nothing more than runs that ask for addresses (docs/design.md, law 15).
"""
