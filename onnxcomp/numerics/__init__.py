"""Arrays in, arrays out: the mathematics of compression, without any graph.

least_squares   damped solves and the exact least squares of a factor given the others
interpolation   few measurements of what grows with a known quantity
moments         second moments of one linear map, and the refits they answer
noise           1/f noise, as images without content
svd             low-rank forms of one kernel in the metric of its inputs
joint_svd       the same forms with factors that several kernels have in common
selection       which input channels can go, and what is lost
option_tables   what a unit can do, at which values of the variables it shares with others
min_sum         the least sum of functions of shared variables
relaxation      what no good choice under limits can hold, by Lagrange multipliers
knapsack        one option for every unit under limits, exactly
quantizers      few values for many weights, as published
compensation    weights changed one column after the other, which take back each other's errors
rounding        the same onto a uniform grid, for entropy coders
pruning         single weights that become zero
"""
