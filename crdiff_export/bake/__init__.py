"""Write baked files: the pruned weights, their headers and residuals, complete or not at all.

Begin with `write`: it takes one `WriteJob` for each output, lets `stream` prune the bytes, and writes them through
`residual_writer` and `direct_writer` to the temp siblings that `staging` makes. `destination` checks paths and space
before, `metadata` makes the headers, and `source_hashes` hashes the base meanwhile. Other rooms import these modules
by their names, so that one who needs `staging` alone loads no more.
"""
