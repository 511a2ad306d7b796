"""Many videos unattended: a queue of jobs on disk, and engines that run it as far as memory allows.

Packages, each importing only those before it: `jobs`, `devices`, `scheduling`, `monitoring`, `execution`, `engines`,
`cli`.
"""
