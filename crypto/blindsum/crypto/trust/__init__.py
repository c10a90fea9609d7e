"""What people sign and what members check before they answer: the aggregator writes none of it."""
