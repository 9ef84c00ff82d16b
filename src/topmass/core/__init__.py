"""Values that every layer shares: granularity, budget, rule, support, plan. Imports torch and nothing else of ours."""
