"""The reference network, which every compact pass is tested against."""
