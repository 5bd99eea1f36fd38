"""Security Agent: findings with deadlines, analysis, dismissal, remediation."""
