"""The BudgetFormer server.

HTTP in front, engines that own a device behind, a supervisor over both.
"""
