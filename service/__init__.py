"""The BudgetFormer server.

HTTP in frontend, engines that own a device behind, a supervisor over both.
"""
