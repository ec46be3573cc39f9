"""The BudgetFormer server: frontends that serve HTTP, engines that compute, and a supervisor."""
